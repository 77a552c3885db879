"""Every table against what transformers itself writes, defaults to and configures."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests import tiny

import anysize.arch as arch
from anysize.arch import families, table
from anysize.arch.expression import names
from anysize.arch.schema import COMMON_KEPT, Architecture, Parameter, tensor_name
from anysize.config import understand
from anysize.errors import AnysizeError
from anysize.notation import parse
from anysize.tensors import expected_tensors, num_parameters, shape_of

ONE_OF_EACH = list({variant.family: variant for variant in tiny.VARIANTS}.values())


def expected_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    config = understand(raw)
    return {name: shape_of(item.arrow, config.sizes) for name, item in expected_tensors(config).items()}


def test_every_family_has_tiny_variants() -> None:
    assert set(families()) == {variant.family for variant in tiny.VARIANTS}


@pytest.mark.parametrize("variant", tiny.VARIANTS, ids=str)
def test_names_and_shapes_are_those_that_transformers_saves(variant: tiny.Variant, tmp_path: Path) -> None:
    model = tiny.model(variant)
    with tiny.quiet_transformers():
        model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert expected_shapes(tiny.config(variant)) == saved
    assert num_parameters(understand(tiny.config(variant))) == model.num_parameters()


@pytest.mark.parametrize("variant", ONE_OF_EACH, ids=str)
def test_a_broken_arrow_gives_other_shapes(variant: tiny.Variant) -> None:
    config = understand(tiny.config(variant))
    name = next(n for n, p in config.architecture.parameters.items() if p.arrow.endswith("ffn"))
    broken = replace(
        config.architecture, parameters={**config.architecture.parameters, name: Parameter("ffn -> norm(hidden)")}
    )
    changed = expected_tensors(replace(config, architecture=broken))
    mended = expected_tensors(config)
    shown = tensor_name(name, 0, 0)
    assert shape_of(changed[shown].arrow, config.sizes) != shape_of(mended[shown].arrow, config.sizes)


@pytest.mark.parametrize("family", families())
def test_a_table_module_holds_data_only(family: str) -> None:
    path = Path(arch.__file__).parent / f"{family}.py"
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)), ast.dump(node)[:80]


def used_axes(architecture: Architecture) -> set[str]:
    arrows = [p.parsed for p in architecture.parameters.values()]
    arrows += [parse(f"{norm.reads} -> {norm.writes}") for norm in architecture.norms.values()]
    return {axis for arrow in arrows for axis in arrow.axes} | {"layer"}


@pytest.mark.parametrize("family", families())
def test_every_declared_axis_is_used_and_every_used_axis_is_declared(family: str) -> None:
    architecture = table(family)
    # A family without grouped queries has a group of one, which its arrows leave out.
    declared = {axis for axis, size in architecture.axes.items() if size != "1"}
    assert used_axes(architecture) - {"group"} == declared - {"group"}
    assert set(architecture.keys) - {"heads"} <= declared


@pytest.mark.parametrize("family", families())
def test_every_declared_name_stands_for_a_tensor_of_some_variant(family: str) -> None:
    architecture = table(family)
    seen = {
        item.pattern
        for variant in tiny.VARIANTS
        if variant.family == family
        for item in expected_tensors(understand(tiny.config(variant))).values()
    }
    unused = {pattern.partition("|")[0] for pattern in architecture.parameters} - seen
    unused |= {p for p, n in architecture.norms.items() if n.stored != "False" and f"{p}.weight" not in seen}
    assert unused == set()
    assert set(architecture.tied) <= {pattern.partition("|")[0] for pattern in architecture.parameters}
    assert set(architecture.tied.values()) <= seen
    assert architecture.final_norm in architecture.norms


@pytest.mark.parametrize("family", families())
def test_defaults_are_those_of_transformers(family: str) -> None:
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[family]()
    differ = {}
    for key, value in table(family).defaults.items():
        theirs = getattr(made, key, "absent")
        # transformers fills a None in from other keys; the table does the same in its expressions.
        filled_in = value is None and key in ("num_key_value_heads", "head_dim")
        if theirs != value and not filled_in:
            differ[key] = (value, theirs)
    assert differ == {}


@pytest.mark.parametrize("family", families())
def test_every_config_key_of_the_family_is_accounted_for(family: str) -> None:
    from transformers import CONFIG_MAPPING

    architecture = table(family)
    known = architecture.handled_keys | set(architecture.kept) | set(COMMON_KEPT) | set(architecture.defaults)
    # What no causal model or classifier reads is left to the rule that a value other than the default is refused.
    assert set(CONFIG_MAPPING[family]().to_dict()) - known == set()
    assert all(reason.strip() for reason in architecture.kept.values())
    assert all(reason.strip() for reason in architecture.dropped.values())


@pytest.mark.parametrize("family", families())
def test_every_default_is_read_by_the_table(family: str) -> None:
    architecture = table(family)
    assert set(architecture.defaults) <= architecture.handled_keys
    assert all(names(text) for text in architecture.depth_locked)


def test_values_that_change_the_function_are_refused() -> None:
    raw = tiny.config(next(v for v in tiny.VARIANTS if v.family == "gpt2"))
    with pytest.raises(AnysizeError, match="cross-attention"):
        understand({**raw, "add_cross_attention": True})
    with pytest.raises(AnysizeError, match=r"residual_multiplier=0\.5"):
        understand({**raw, "residual_multiplier": 0.5})


def test_gemma_and_llama_rules_are_those_that_transformers_enforces() -> None:
    from transformers import CONFIG_MAPPING

    refused = {"llama", "gemma2", "gemma3_text"}
    for family in families():
        rules = " ".join(rule.holds for rule in table(family).rules)
        if "head_dim" not in table(family).defaults:
            continue
        sizes = {"hidden_size": 20, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4}
        assert ("hidden_size % num_attention_heads" in rules) == (family in refused)
        if family in refused:
            with pytest.raises(Exception, match="hidden size"):
                CONFIG_MAPPING[family](**sizes)
        else:
            assert CONFIG_MAPPING[family](**sizes).hidden_size == 20
