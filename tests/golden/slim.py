"""Cut the full set of recorded cases down to what the repository carries: python tests/golden/slim.py FULL_FOLDER

One case of each path; trajectories and duplicate variants are left out. README.md beside this file says what the data are.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CASES = {
    "mar_head": [
        "disa_s31_r6_cfg1.0_t0.9",
        "disa_s63_r6_cfg3.0_t0.9",
        "disa_s31_r10_cfgtensor3.0_t1.0",
        "disa_cosine_s20_r6_cfg3.0",
        "disa_twostage_s40_r6_cfg1.0",
        "default20_r10_cfg3.0_t0.9",
        "DDIM_s31_r6_cfg1.0",
        "DDIM_s31_r6_cfg3.0",
        "DPM_Solver_s31_r6_cfg1.0",
        "DPM_Solver++_s63_r6_cfg1.0",
    ],
    "mar_head_b": ["disa_s63_r1_cfg1.0", "disa_s60_r66_cfg3.2tensor", "disa_s63_r8_temp0"],
    "mar_e2e": ["linear_cfg3.0", "nolabels_cfg1.0"],
    "flowar_e2e": ["cross_25to15_cfg2.4", "cross_17to9_cfg1.0"],
    "xar": ["em_7to4_cfg2.3_gh0.6", "euler_9to5_cfg2.7_gh0.7_gl0.2"],
    "harmon_e2e": ["f32_cfg3_linear", "f32_cfg1_5x3", "bf16_cfg3_linear"],
}
FLOW_STEPS = [2, 3, 15, 25, 50]
EVALS = {"mar_head": ["r6_int", "r6_frac"]}


def keep(stem: str, key: str) -> bool:
    if key.startswith("case/"):
        # FlowAR's conditions and results at each scale are the recorded cases of its head.
        left_out = () if stem == "flowar_e2e" else ("/traj_f32", "/z", "/out", "/x", "/v", "/t")
        return key.split("/")[1] in CASES[stem] and not key.endswith(left_out)
    if key.startswith("eval/"):
        return key.split("/")[1] in EVALS.get(stem, [])
    return not key.startswith("sd_plain/")


def main(full: Path) -> None:
    for stem, names in CASES.items():
        with np.load(full / f"{stem}.npz", allow_pickle=False) as source:
            meta = json.loads(str(source["meta"]))
            meta["cases"] = [case for case in meta["cases"] if case["name"] in names]
            meta["evals"] = [e for e in meta.get("evals", []) if e["name"] in EVALS.get(stem, [])]
            arrays = {key: source[key] for key in source.files if key != "meta" and keep(stem, key)}
        np.savez_compressed(HERE / f"{stem}.npz", meta=json.dumps(meta), **arrays)
    with np.load(full / "ddpm_timesteps.npz", allow_pickle=False) as source:
        dpm = {key: source[key] for key in source.files if key.startswith(("dpm/5/", "dpm/50/"))}
    np.savez_compressed(HERE / "ddpm_timesteps.npz", **dpm)
    with np.load(full / "flow_time_grids.npz", allow_pickle=False) as source:
        grids = {key: source[key] for key in source.files if "/" in key and int(key.split("/")[1]) in FLOW_STEPS}
    np.savez_compressed(HERE / "flow_time_grids.npz", **grids)
    for name in ("schedules.json", "ddpm_timesteps.json"):
        shutil.copyfile(full / name, HERE / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
