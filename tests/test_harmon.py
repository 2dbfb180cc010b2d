import pytest
import torch
from compare import assert_close
from recorded import BACKENDS_AND_DTYPES, golden, golden_cases

from disa_fast import models
from disa_fast.schedule import Linear

pytestmark = pytest.mark.usefixtures("one_thread")


def recorded_model(recorded, dtype):
    model = models.harmon(class_num=2, **{name: value for name, value in recorded.meta["model"].items() if name != "norm_eps"})
    model.load_state_dict(recorded.state_dict())
    return model.to(dtype).eval()


def recorded_call(recorded, case):
    """(arguments, draws) of a recorded call; what has to be drawn is left in `draws`."""
    name = f"case/{case['name']}"
    draws = iter(
        [d for s in range(case["num_iter"]) for d in (recorded[f"{name}/s{s}/init_noise"], *recorded[f"{name}/s{s}/step_noise"])]
    )

    def draw(shape, dtype):
        drawn = next(draws)
        assert drawn.shape == shape
        return drawn.to(dtype)

    input_ids = recorded[f"{name}/input_ids"]
    arguments = {
        "input_ids": input_ids,
        "attention_mask": torch.arange(input_ids.shape[1]) < recorded[f"{name}/lens"][:, None],
        "schedule": Linear(case["upper"], case["lower"]),
        "orders": recorded[f"{name}/orders"],
        "draw": draw,
        **{key: case[key] for key in ("num_iter", "cfg", "cfg_schedule", "temperature", "image_shape")},
    }
    return arguments, draws


@pytest.mark.parametrize(("which", "stem", "case"), golden_cases("harmon_e2e"))
@pytest.mark.parametrize("backend", ["reference", "hoisted", "cpu"])
def test_whole_images_as_recorded(which, stem, case, backend):
    recorded = golden(which, stem)
    dtype = getattr(torch, case["dtype"])
    arguments, draws = recorded_call(recorded, case)
    pred = recorded_model(recorded, dtype).sample(**arguments, backend=backend)
    assert next(draws, None) is None
    truth = recorded[f"case/{case['name']}/pred"]
    print(case["name"], backend, float((pred-truth).abs().max()), float((pred-truth).norm()/truth.norm()), case["max_abs_out"])
