"""Invariants of loading a user's reward function from a file."""

import pickle
from pathlib import Path

import pytest

from verl.utils.reward_score.custom import CustomFunction

SOURCE = """
import dataclasses

@dataclasses.dataclass
class Result:
    value: float

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    return Result(float(solution_str == ground_truth)).value + bonus

constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(SOURCE)
    return path


def test_the_function_is_loaded_from_its_file(file: Path) -> None:
    function = CustomFunction(str(file)).load()
    assert function("s", "a", "a", bonus=0.5) == 1.5


def test_what_travels_is_path_and_name(file: Path) -> None:
    custom = CustomFunction(str(file), "compute_score", {"bonus": 1.0})
    assert pickle.loads(pickle.dumps(custom)) == custom


def test_two_files_of_one_name_stay_apart(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "my_reward.py"
    other.parent.mkdir()
    other.write_text("def compute_score(solution_str):\n    return -1.0\n")
    first, second = CustomFunction(str(file)).load(), CustomFunction(str(other)).load()
    assert (first("s", "a", "a"), second("a")) == (1.0, -1.0)


def test_a_missing_file_is_an_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"custom_reward_function.path=.*nowhere.py: no such file"):
        CustomFunction(str(tmp_path / "nowhere.py")).load()


@pytest.mark.parametrize("name", ["score", "constant"])
def test_a_name_that_is_no_function_is_an_error_listing_those_there(file: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"name='{name}'.*functions there: Result, compute_score"):
        CustomFunction(str(file), name).load()


def test_a_file_that_fails_on_import_is_an_error_with_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_here\n")
    with pytest.raises(ValueError, match=r"fails on import: ModuleNotFoundError.*no_such_module_here"):
        CustomFunction(str(path)).load()


def test_a_file_that_is_not_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reward.txt"
    path.write_text("x")
    with pytest.raises(ValueError, match="not a python file"):
        CustomFunction(str(path)).load()
