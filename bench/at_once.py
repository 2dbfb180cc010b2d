"""A pytest plugin, -p bench.at_once: tells what becomes of each test as it happens, in files that outlive a process that dies.

DISA_FAST_TEST_NOTES: a JSON line when a test begins, and one when a part of it ends other than well, or all of it has ended.
DISA_FAST_TEST_FAILURES: each failure with its trace.
"""

import json
import os

from .gpu_results import end_with_parent


def pytest_configure(config):
    end_with_parent()


def pytest_runtest_logstart(nodeid, location):
    _note({"began": nodeid})


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        _note({"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration})
    if report.failed:
        text = report.longreprtext
        shown = text if len(text) < 8000 else f"{text[:4000]}\n[...]\n{text[-4000:]}"
        sections = "".join(f"--- {title}\n{content[-1000:]}\n" for title, content in report.sections)
        _append("DISA_FAST_TEST_FAILURES", f"==== {report.nodeid}, {report.when}, {report.duration:.1f} s\n{shown}\n{sections}\n")


def pytest_runtest_logfinish(nodeid, location):
    _note({"ended": nodeid})


def pytest_collectreport(report):
    if report.failed:
        _note({"test": report.nodeid, "outcome": "failed", "seconds": 0.0})
        _append("DISA_FAST_TEST_FAILURES", f"==== {report.nodeid}, collection\n{report.longreprtext[-8000:]}\n\n")


def _note(what):
    _append("DISA_FAST_TEST_NOTES", json.dumps(what) + "\n")


def _append(variable, text):
    """In one write, since several processes may append to one file."""
    descriptor = os.open(os.environ[variable], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
