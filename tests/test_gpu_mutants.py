"""Of what surrounds measuring on a GPU: each repair undone in a copy of bench/, which the test beside it has to notice."""

import shutil
import subprocess
import sys

import pytest
from host_gpu import ROOT

MUTANTS = {  # by what is wrong with it: file of bench/, its text, what stands there instead, and the test
    "a time-out swallowed by the runner": (
        "gpu_first.py",
        "        timed_out = True\n",
        "        pass\n",
        "test_gpu_first.py",
        "test_one_that_hangs_ends_with_its_group_and_the_others_go_on",
    ),
    "a death taken for an end": (
        "gpu_first.py",
        "elif code < 0:",
        "elif False:",
        "test_gpu_first.py",
        "test_one_that_does_not_end_well_is_named",
    ),
    "a finished phase done again": (
        "gpu_first.py",
        'get("state") != DONE]',
        'get("state") != 0]',
        "test_gpu_first.py",
        "test_phases_say_their_limit_and_those_without_time_are_left_out_and_done_later",
    ),
    "what failed done before what had not begun": (
        "gpu_first.py",
        '["state"] != LEFT_OUT)',
        '["state"] == 0)',
        "test_gpu_first.py",
        "test_what_had_not_begun_comes_before_what_failed",
    ),
    "a phase that outlives the runner": (
        "gpu_results.py",
        "prctl(PR_SET_PDEATHSIG, signal.SIGKILL)",
        "prctl(PR_SET_PDEATHSIG, 0)",
        "test_gpu_first.py",
        "test_nothing_goes_on_when_all_is_killed",
    ),
    "plugins of other people": (
        "gpu_tests.py",
        '["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]',
        '["PYTEST_ENABLE"]',
        "test_gpu_first.py",
        "test_other_plugins_of_pytest_do_no_harm",
    ),
    "nothing on disk before the compiler": (
        "gpu_measure.py",
        "truth)\n        self.time_shape(",
        "truth)\n        (lambda *_: None)(",
        "test_gpu_measure.py",
        "test_what_needs_no_compiler_is_on_disk_before_one_is_asked",
    ),
    "turns without an end": (
        "gpu_measure.py",
        "if turn and time.monotonic() > until:",
        "if False:",
        "test_gpu_measure.py",
        "test_no_further_turn_begins_when_the_time_is_over",
    ),
    "a terminal without a budget": (
        "gpu_results.py",
        "if self.left - len(line) - 1 >= kept",
        "if True or kept",
        "test_gpu_first.py",
        "test_the_terminal_keeps_its_budget_and_room_for_the_summary",
    ),
    "no git": (
        "gpu_results.py",
        "except OSError:",
        "except KeyError:",
        "test_gpu_first.py",
        "test_without_git_the_commit_is_that_of_the_environment",
    ),
    "a build that goes elsewhere": (
        "gpu_first.py",
        'shutil.copy(new, ROOT / "disa_fast")',
        "pass",
        "test_gpu_first.py",
        "test_what_is_built_goes_into_the_checkout",
    ),
    "tests that hang pass": (
        "gpu_tests.py",
        'end = f"NOT FINISHED in {limit:.0f} s"',
        'end = "passed"',
        "test_gpu_first.py",
        "test_tests_that_do_not_end_in_time_are_a_failure_with_details",
    ),
    "tests that hang are killed at once, with no word": (
        "at_once.py",
        "    if report.failed:\n        text",
        "    if False:\n        text",
        "test_gpu_first.py",
        "test_tests_that_do_not_end_in_time_are_a_failure_with_details",
    ),
    "a crossover of 0 where cuda cannot run": (
        "tune_cuda.py",
        "if at_all is not None:",
        "if False:",
        "test_tune_cuda.py",
        "test_nothing_is_written_where_cuda_cannot_run",
    ),
    "as many steps as were asked for": (
        "gpu_measure.py",
        "torch.randn(len(table), n, 16",
        "torch.randn(steps, n, 16",
        "test_gpu_measure.py",
        "test_a_call_of_every_shape_has_as_many_steps_as_its_table",
    ),
    "one call a sample": (
        "gpu_measure.py",
        "min(MOST_CALLS, max(",
        "min(1, max(",
        "test_gpu_measure.py",
        "test_a_sample_is_of_several_calls",
    ),
    "autocast without its cache, loop": (
        "peers.py",
        ".float().requires_grad_()",
        ".float()",
        "test_gpu_measure.py",
        "test_autocast_casts_each_weight_once_a_loop",
    ),
    "autocast without its cache, image": (
        "images.py",
        "self.upstream = self.setting.build().eval()",
        "self.upstream = self.setting.build().eval().requires_grad_(False)",
        "test_gpu_measure.py",
        "test_autocast_casts_each_weight_once_an_image",
    ),
    "noise of a captured image drawn anew": (
        "images.py",
        "        self._filled = True\n",
        "",
        "test_gpu_measure.py",
        "test_what_is_moved_ahead_is_moved_once",
    ),
    "wide bounds": (
        "gpu_measure.py",
        "TOLERATED = 3.0",
        "TOLERATED = 30.0",
        "test_gpu_measure.py",
        "test_the_bounds_are_near_what_is_expected",
    ),
    "one bound of two": (
        "gpu_measure.py",
        '"worst element": float(worst)}',
        '"worst element": 0.0}',
        "test_gpu_measure.py",
        "test_a_wrong_backend_is_found_wrong",
    ),
    "a broken context survived": (
        "gpu_measure.py",
        'if ON_GPU and DEVICE.type == "cuda":',
        "if False:",
        "test_gpu_measure.py",
        "test_a_broken_context_ends_the_phase",
    ),
    "rows written at the end": (
        "gpu_measure.py",
        "+ [entry]\n        self.write()",
        "+ [entry]",
        "test_gpu_measure.py",
        "test_results_are_on_disk_after_every_row",
    ),
    "bits that are not compared": (
        "soak.py",
        "elif not torch.equal(result, first):",
        "elif False:",
        "test_soak.py",
        "test_one_call_that_is_wrong_among_many_is_found",
    ),
    "a launch that does not give up": (
        "soak.py",
        "if head.denoise(z, table, **how).isfinite().any():",
        "if False:",
        "test_soak.py",
        "test_a_launch_that_gives_up",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MUTANTS)
def test_a_mutant_is_caught(what, tmp_path):
    name, old, new, file, test = MUTANTS[what]
    for path in ROOT.iterdir():
        if path.name not in ("bench", ".git", "build"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results", "baselines", "__pycache__"))
    source = (ROOT / "bench" / name).read_text()
    assert source.count(old) == 1
    (tmp_path / "bench" / name).write_text(source.replace(old, new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{file}::{test}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-3000:]
    assert "1 failed" in done.stdout
