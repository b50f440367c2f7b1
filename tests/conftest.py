"""Options that all tests share."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mechdsl.base.records import EXTERNAL_MODULES
from mechdsl.syntax import parser as grammar

# Imports and collection leave little to collect; `pytest_collection_finish` turns it on again.
gc.disable()
# Several workers share the cores; the numbers must not depend on how many threads sum them up.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests that want a store name one; none is left beside the examples.
os.environ["MECHDSL_STORE"] = "none"
WORKER = "PYTEST_XDIST_WORKER" in os.environ
MEMORY = Path("/dev/shm")
"""A folder in memory, where a sync takes no time: a store syncs each transaction several times."""
NEEDED = 4 << 30
"""Bytes that must be free there; what passed tests wrote is removed."""
if not WORKER:
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= NEEDED:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # parent of every `tmp_path`
    # A model of files is checked once in a session, whichever worker or process loads it first.
    os.environ["MECHDSL_CACHE"] = tempfile.mkdtemp(
        prefix="mechdsl-tests-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens",
        action="store_true",
        default=False,
        help="Rewrite expected texts; read the diff before you commit it.",
    )
    parser.addoption(
        "--on-device",
        default="cpu",
        metavar="DEVICE",
        help="Run files on this device; references stay on the CPU.",
    )


def pytest_configure(config: pytest.Config) -> None:
    grammar.load_parser()  # a fresh checkout makes its tables here, not within a test that is timed
    if config.getoption("--update-goldens") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--update-goldens writes files that cases share: leave -n out")
    if not WORKER and config.getoption("numprocesses", None):
        return  # this process runs no test
    # Both import torch, which reads the environment.
    from .one_by_one import raise_at_once
    from .shared_models import share_models

    raise_at_once()
    share_models(str(config.getoption("--on-device")))


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    """Modules that a test registers entries from are forgotten with it: of one that can't be read
    any more it isn't known what numbers hang on, and no store would keep any in this process."""
    before = set(EXTERNAL_MODULES)
    yield
    EXTERNAL_MODULES.intersection_update(before)


def pytest_unconfigure() -> None:
    if not WORKER:
        shutil.rmtree(os.environ["MECHDSL_CACHE"], ignore_errors=True)


LONG = (
    "cli/test_guides.py",
    "plugin_package/test_plugins.py",
    "test_error_pages.py",
    "test_examples.py",
    "execute/test_encoder_decoders.py",
    "execute/test_value_keys.py",
    "pipeline/test_trained_coordinate_masks.py",
    "models/test_identity.py",
    "pipeline/test_trained_dictionaries.py",
    "messages/test_messages.py",
    "rules/test_weights.py",
    "images/test_rules.py",
    "cli/test_rerun.py",
    "language/test_language.py",
    "rules/test_in_replies.py",
    "pipeline/test_trained_decoders.py",
    "execute/test_properties.py",
    "pipeline/test_batches_and_precision.py",
    "models/test_offload.py",
    "compiler/test_training_cost.py",
)
"""Files that take a worker longest."""


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests slow that repeat others, and hand out long files first: handed out last, one would
    keep a worker while the others have nothing."""
    from .execute.encoder_decoders import CONFIGS as ENCODER_DECODERS
    from .models.families import CONFIGS
    from .quick import read_seconds, thin_out
    from .rules.models import FAMILIES

    measured = {} if config.pluginmanager.has_plugin("tests.seconds") else read_seconds()
    thin_out(items, {*CONFIGS, *FAMILIES, *ENCODER_DECODERS}, measured)
    tests = Path(__file__).parent
    order = {tests / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the garbage collector needn't go over it each time.

    Nor need it run every 700 allocations: files cache models, results and references. What is
    garbage already stays too: finding it would take two seconds in each process.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def update(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are rewritten instead of compared."""
    return bool(request.config.getoption("--update-goldens"))
