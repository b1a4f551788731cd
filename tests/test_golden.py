"""Every golden case: within 1e-10 in float64, and within 2e-5 with the same inputs rounded to float32."""

import pytest
import torch

import golden_cases

ALL_CASES = [case for file in golden_cases.CASES_PER_FILE for case in golden_cases.load(file)]


def test_no_file_and_no_case_is_missing():
    stored = {path.stem for path in (golden_cases.Path(golden_cases.__file__).with_name("golden")).glob("*.json")}
    assert stored == set(golden_cases.CASES_PER_FILE)
    assert {file: len(golden_cases.load(file)) for file in stored} == golden_cases.CASES_PER_FILE
    assert len({case.name for case in ALL_CASES}) == len(ALL_CASES) == 410


def test_gradients_are_part_of_the_vectors():
    with_gradient = [case for case in ALL_CASES if any(name.startswith("grad_") for name in case.record["expected"])]
    assert len(with_gradient) == 48 + 40 + 15  # policy_loss, value_loss, logprobs_from_logits


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_float64(case):
    golden_cases.check(case, torch.float64)


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_float32(case):
    golden_cases.check(case, torch.float32)
