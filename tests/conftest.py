import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tensors are tiny, and tests may run side by side
settings.register_profile("hanse", deadline=None, derandomize=True)
settings.load_profile("hanse")

FOLDERS = [Path(os.environ["HANSE_DATA"])] if "HANSE_DATA" in os.environ else [Path(__file__).parents[2] / "shared" / "data"]


@pytest.fixture
def real_data() -> Callable[[str], str]:
    """Find a file of the optional real data sets, in HANSE_DATA or in a folder shared/data beside the repository; else skip."""

    def find(name: str) -> str:
        for folder in FOLDERS:
            if (folder / name).is_file():
                return str(folder / name)
        pytest.skip(f"real data {name} not found; set HANSE_DATA to the folder that holds it")

    return find
