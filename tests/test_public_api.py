"""The public surface: names, signatures and defaults against a snapshot and the documented ones, and docstrings.

After a change of the surface that is meant, refresh the snapshot with ``python tests/test_public_api.py --update``.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_origin

ROOT = Path(__file__).parents[1]
SNAPSHOT = Path(__file__).with_name("public_api.json")
UPDATE = "--update"

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # run as a script, the repository is not on the path

import lightning_compress  # noqa: E402

# Arguments as documented: these exist with these names and defaults; further ones are keyword-only and optional.
DOCUMENTED = {
    "DistillationCallback": "teacher, *, student=None, output=None, teacher_transform=None, temperature=4.0, "
    "task_weight=0.1, kd_weight=0.9, loss_kind='auto', class_dim=None, ignore_index=None",
    "AttentionTransferCallback": "teacher, *, pairs='auto', map_kind='power', power=2.0, weight='auto', mode='code', "
    "student=None",
    "FactorTransferCallback": "teacher, *, pair='auto', factor_ratio=0.5, weight=500.0, pretrain_epochs=6, "
    "paraphraser=None, student=None, translator_lr=None",
    "PSGDCallback": "bits=4, *, gradient_scale='auto', granularity='tensor', target='grid', eps=0.0, edge_bits='auto', "
    "layers=None, exclude=None",
    "PTQCallback": "*, weight_bits=8, activation_bits=8, observer='minmax', weight_range='auto', "
    "reestimate_batchnorm='auto', max_samples=512, layers=None, exclude=None",
    "QATCallback": "*, weight_bits=8, activation_bits=8, step_size='mse', start=0.0, freeze_batchnorm_at='auto', "
    "freeze_observers_at='auto', layers=None, exclude=None",
    "PruningCallback": "sparsity=None, *, schedule='cubic', start=0.0, end=0.75, update_interval=1, rounds=5, "
    "regrow=False, score='magnitude', scope='global', pattern='unstructured', rewind=None, "
    "reestimate_batchnorm=False, layers=None, exclude=None",
    "StructuredPruningCallback": "ratio, *, schedule='one_shot', score='l2', budget='filters', min_channels=8, "
    "layers=None, exclude=None",
    "DPFCallback": "sparsity, *, schedule='cubic', start=0.0, end=0.75, update_interval=16, freeze_at=None, "
    "dead_filters='zero_grad', layers=None, exclude=None",
    "DCILCallback": "sparsity, *, schedule='cubic', start=0.0, end=0.75, update_interval=16, dense_path='own', "
    "kl_start=0.25, temperature=2.0, layers=None, exclude=None",
    "ExportCallback": "path, *, precision='fp32', metric=None, tolerance=None, sample=None",
    "CompressionReport": "*, path=None, latency=True",
    "functional.distillation_loss": "student_logits, teacher_logits, temperature",
    "functional.attention_map": "activation, power=2.0, kind='power'",
    "functional.attention_transfer_loss": "student, teacher, power=2.0, kind='power', mode='code'",
    "functional.factor_transfer_loss": "student_factor, teacher_factor",
    "functional.quantization_grid": "weight, bits",
    "functional.position_scale": "weight, bits, eps=0.0",
    "functional.zero_scale": "weight, eps",
    "functional.fake_quantize": "x, scale, zero_point, quant_min, quant_max",
    "functional.learned_step_quantize": "x, step, bits, signed=True",
    "functional.magnitude_mask": "weights, sparsity, scope='global'",
    "functional.n_m_mask": "weight, n, m",
    "functional.cubic_schedule": "progress, start, end",
    "export.to_onnx": "module, path, sample=None, precision='fp32', checkpoint=None",
    "export.evaluate": "path, module, trainer_or_dataloaders",
    "export.plain_state_dict": "checkpoint_path",
    "export.load_shrunk": "module, checkpoint_path",
}
DOCUMENTED |= {
    name: f"{arguments}{', name=None' if '*' in arguments else ', *, name=None'}"
    for name, arguments in DOCUMENTED.items()
    if name.endswith("Callback") or name == "CompressionReport"
}


def public_names() -> list[str]:
    """Dotted names below the package: its own, and those of its public modules."""
    names = []
    for name in lightning_compress.__all__:
        value = getattr(lightning_compress, name)
        names += [f"{name}.{inner}" for inner in value.__all__] if inspect.ismodule(value) else [name]
    return sorted(names)


def resolve(name: str) -> Any:
    value: Any = lightning_compress
    for part in name.split("."):
        value = getattr(value, part)
    return value


def surface() -> dict[str, Any]:
    """Every public name with its signature; classes with their own public methods, exceptions with their bases."""
    return {name: describe(resolve(name)) for name in public_names() if name != "__version__"}


def describe(value: Any) -> Any:
    if inspect.isclass(value) and issubclass(value, BaseException):
        return {"bases": [base.__name__ for base in value.__bases__]}
    if inspect.isclass(value):
        methods = {
            name: arguments_of(inspect.unwrap(method))
            for name, method in vars(value).items()
            if inspect.isfunction(method) and not name.startswith("_")
        }
        return {"init": arguments_of(value), "methods": dict(sorted(methods.items()))}
    is_alias = get_origin(value) is not None
    return arguments_of(value) if callable(value) and not is_alias else repr(value)


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """One line per argument, such as ``temperature: float = 4.0 (keyword)``."""
    lines = []
    for parameter in inspect.signature(function).parameters.values():
        annotation = "" if parameter.annotation is parameter.empty else f": {_plain(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        kind = {
            parameter.KEYWORD_ONLY: " (keyword)",
            parameter.POSITIONAL_ONLY: " (positional)",
            parameter.VAR_POSITIONAL: " (*)",
            parameter.VAR_KEYWORD: " (**)",
        }.get(parameter.kind, "")
        lines.append(f"{parameter.name}{annotation}{default}{kind}")
    return lines


def _plain(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", repr(annotation))


def update() -> None:
    SNAPSHOT.write_text(json.dumps(surface(), indent=2) + "\n")
    print(f"wrote {SNAPSHOT.name}: {len(surface())} names")


if __name__ == "__main__":
    # before pytest is imported: refreshing the snapshot needs the package and the standard library only
    if sys.argv[1:] != [UPDATE]:
        raise SystemExit(f"usage: python {sys.argv[0]} {UPDATE}")
    update()
    raise SystemExit


import pytest  # noqa: E402


@pytest.mark.parametrize("name", lightning_compress.__all__)
def test_every_public_name_exists(name):
    value = getattr(lightning_compress, name)
    assert value is getattr(lightning_compress, name)
    assert name in dir(lightning_compress)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'lightning_compress' has no attribute 'nothing'"):
        getattr(lightning_compress, "nothing")  # noqa: B009


def test_the_package_alone_imports_nothing_heavy():
    code = "import sys, lightning_compress; print(sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(re.findall(r"'(\w+)'", result.stdout))
    assert "lightning_compress" in loaded
    assert loaded & {"torch", "lightning", "pytorch_lightning", "torchmetrics", "numpy", "matplotlib", "onnx"} == set()


def test_the_surface_equals_the_snapshot():
    assert surface() == json.loads(SNAPSHOT.read_text()), (
        f"if this is meant: python tests/{Path(__file__).name} {UPDATE}"
    )


def test_every_callback_in_the_package_is_public():
    files = sorted((ROOT / "lightning_compress" / "callbacks").glob("*.py"))
    bases = (
        "calibrating.py",
        "dynamic.py",
        "features.py",
        "masked.py",
        "masks.py",
        "quantised.py",
        "saving.py",
        "teaching.py",
    )  # nobody's to name
    sources = [path.read_text() for path in files if path.name not in bases]
    classes = {node.name for source in sources for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    callbacks = {name for name in classes if name in DOCUMENTED or re.fullmatch(r"[A-Z]\w*Callback", name)}
    assert callbacks <= set(lightning_compress.__all__)
    assert "DistillationCallback" in callbacks


def test_every_public_callback_is_documented():
    base = lightning_compress.CompressionCallback
    values = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
    callbacks = {name for name, value in values.items() if inspect.isclass(value) and issubclass(value, base)}
    assert callbacks - {"CompressionCallback"} <= set(DOCUMENTED)
    assert "DistillationCallback" in callbacks


def documented_and_present() -> list[str]:
    """What the documented table names and the package has; the callbacks are not imported before their own test."""
    present = {*lightning_compress.__all__}
    for module in ("functional", "export"):
        present |= {f"{module}.{name}" for name in getattr(lightning_compress, module).__all__}
    return [name for name in DOCUMENTED if name in present]


@pytest.mark.parametrize("name", documented_and_present())
def test_documented_arguments_have_the_documented_defaults(name):
    documented = inspect.signature(eval(f"lambda {DOCUMENTED[name]}: None")).parameters
    actual = inspect.signature(resolve(name)).parameters
    assert {key: actual[key].kind for key in documented if key in actual} == {
        key: parameter.kind for key, parameter in documented.items()
    }
    optional = {
        key: parameter.default
        for key, parameter in documented.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert {key: actual[key].default for key in optional} == optional
    further = [parameter for key, parameter in actual.items() if key not in documented]
    assert [p.name for p in further if p.kind is not p.KEYWORD_ONLY or p.default is p.empty] == []


def test_what_must_be_documented_is_present():
    assert {"functional.distillation_loss", "DistillationCallback"} <= set(documented_and_present())


# --- docstrings of the functions that users and other modules call ---


def modules_below(package: str) -> Iterator[str]:
    for path in sorted((ROOT / "lightning_compress" / package).glob("*.py")):
        if not path.stem.startswith("_"):
            yield f"lightning_compress.{package}.{path.stem}"


def missing_from_docstring(function: Callable[..., Any]) -> list[str]:
    """Which of the sections that a public function needs its docstring lacks."""
    function = inspect.unwrap(function)
    text = inspect.getdoc(function) or ""
    described = set(re.findall(r"^ +\*{0,2}(\w+)(?: \([^)]*\))?:", _section(text, "Args"), re.M))
    signature = inspect.signature(function)
    missing = [f"Args: {name}" for name in signature.parameters if name not in described]
    if signature.return_annotation not in (None, "None", "Iterator[None]") and not (
        _section(text, "Returns") or _section(text, "Yields")
    ):
        missing.append("Returns")
    if ">>> " not in _section(text, "Example"):
        missing.append("Example")
    return missing


def _section(text: str, title: str) -> str:
    found = re.search(rf"^{title}s?:\n((?:[ \t]+.*\n?|\n)+)", text, re.M)
    return found.group(1) if found else ""


@pytest.mark.parametrize("name", [*modules_below("functional"), *modules_below("mechanisms")])
def test_public_functions_are_documented(name):
    module = import_module(name)
    functions = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == name and not key.startswith("_")
    }
    assert {key: missing_from_docstring(value) for key, value in functions.items()} == {key: [] for key in functions}


def test_the_docstring_check_finds_what_is_missing():
    def bare(first: int, second: int = 2) -> int:
        """Add."""
        return first + second

    def partly(first: int, second: int) -> None:
        """Add.

        Args:
            first: A number (see second: below).

        Example:
            partly(1, 2)
        """

    def whole(first: int, *others: int) -> int:
        """Add.

        Args:
            first: A number.
            *others: More of them.

        Returns:
            The sum.

        Example:
            >>> 1 + 1
            2
        """
        return first + sum(others)

    assert missing_from_docstring(bare) == ["Args: first", "Args: second", "Returns", "Example"]
    assert missing_from_docstring(partly) == ["Args: second", "Example"]
    assert missing_from_docstring(whole) == []
