"""Results say what they were measured on, and nothing else about the machine."""

import platform

import torch

from disa_fast.collect_env import cpu_name


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.clear()
    machine_info.update(
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
    )
