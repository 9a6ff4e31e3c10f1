"""States, values of param groups, and rules: C++, Python and the tests have the same ones."""

from __future__ import annotations

import inspect

import pytest
import torch

from adamprox import _C, hyperparameters
from adamprox.hyperparameters import DECAY_SETTINGS, DEFAULTS, RULE_OPTIONS, RULES, STATES
from registry import CELLS, OPTIMIZERS, OPTIONS

# Of each group, beside DEFAULTS and the options of its rule.
REQUIRED = {"lr", "betas", "eps", "weight_decay"}
CLASSES = {spec.cls.decay: spec.cls for spec in OPTIMIZERS.values()}


def group_of(rule: str, **arguments) -> dict:
    """A param group as an optimizer of that rule's class makes it."""
    [group] = CLASSES[rule]([torch.nn.Parameter(torch.ones(1))], **arguments).param_groups
    return group


def test_python_and_cpp_have_the_same_states():
    assert _C.states == [(state.key, state.type, state.needs) for state in STATES]


@pytest.mark.parametrize("rule", RULES)
def test_a_group_has_every_value_that_is_read(rule):
    group = group_of(rule, decay_by="schedule")
    numbers = {key.partition("[")[0] for key in _C.numbers}
    options = set(RULE_OPTIONS) - set(RULES[rule])
    assert numbers | {*_C.flags} <= group.keys() | options
    known = {"initial_lr"} | REQUIRED | DEFAULTS.keys() | RULE_OPTIONS.keys()
    assert numbers | {*_C.flags} <= known
    assert {key.partition("[")[0] for key in _C.numbers if "[" in key} == {"betas", "bounds"}
    assert options.isdisjoint(group)


@pytest.mark.parametrize("rule", RULES)
def test_a_group_has_nothing_that_is_unknown(rule):
    known = REQUIRED | DEFAULTS.keys() | {"params", "decay", "decoupled_weight_decay"}
    assert group_of(rule).keys() == known | RULES[rule].keys()


def test_cpp_python_and_triton_have_the_same_rules():
    names, decays, _ = zip(*_C.rules, strict=True)
    assert len({*names}) == len(names)
    assert list(dict.fromkeys(decays)) == list(RULES)
    assert all(option is None or option in RULES[decay] for _, decay, option in _C.rules)
    assert {decay for _, decay, option in _C.rules if option is None} == set(RULES)
    assert {"decay", "weight_decay", "decay_by", *RULE_OPTIONS} == {*DECAY_SETTINGS}
    from adamprox.triton_kernels import update

    assert update.RULES.value == names


@pytest.mark.parametrize("rule", RULES)
def test_arguments_of_a_class_are_the_values_of_its_groups(rule):
    parameters = inspect.signature(CLASSES[rule]).parameters
    options = DEFAULTS.keys() | RULES[rule].keys()
    assert parameters.keys() == {"params", "backend"} | REQUIRED | options
    for key, default in {**DEFAULTS, **RULES[rule]}.items():
        assert parameters[key].default is default
    for key in (*DEFAULTS, *RULES[rule], "backend"):
        assert f"{key}: " in CLASSES[rule].__doc__ or f"{key}, " in CLASSES[rule].__doc__
    options = hyperparameters.Options.__annotations__.keys()
    assert {*options} == DEFAULTS.keys() - {"amsgrad"} | RULE_OPTIONS.keys()


def test_the_tests_have_every_rule_state_and_option():
    assert list(CLASSES) == list(RULES)
    values = [
        {**group, **OPTIONS[option].arguments}
        for _, option in CELLS
        for group in OPTIONS[option].groups
    ]
    assert {group.get("decay") for group in values} >= set(RULES)
    for state in STATES:
        assert state.needs is None or any(group.get(state.needs) for group in values)
    for option, neutral in RULE_OPTIONS.items():
        assert any(group.get(option, neutral) != neutral for group in values)
    assert {optimizer for optimizer, _ in CELLS} == OPTIMIZERS.keys()
