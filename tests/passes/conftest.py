"""Keeps torch's structured trace out of what pytest captures: hundreds of records for each graph, made for nobody."""

import logging

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """pytest hangs its handlers on each logger that does not propagate; torch writes its trace where it finds any."""
    logging.getLogger("torch.__trace").handlers.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    """The same, since pytest does so for each phase anew."""
    logging.getLogger("torch.__trace").handlers.clear()
