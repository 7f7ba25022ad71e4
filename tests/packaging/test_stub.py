"""bnext/_C.pyi against the compiled module, both ways."""

import ast
import inspect
from pathlib import Path

import pytest

import bnext
from bnext import _C

STUB = ast.parse((Path(bnext.__file__).parent / "_C.pyi").read_text())


def stub_names(body: list[ast.stmt]) -> set[str]:
    return {
        node.name for node in body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    } | {
        node.target.id for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }  # fmt: skip


def public_names(thing: object) -> set[str]:
    return {name for name in vars(thing) if not name.startswith("_")}


def stub_classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def test_module_has_exactly_the_stubs_names() -> None:
    assert public_names(_C) == stub_names(STUB.body)
    assert stub_names(STUB.body), "the stub is not empty"


def test_classes_have_exactly_the_stubs_members() -> None:
    assert stub_classes()
    for name, node in stub_classes().items():
        assert public_names(getattr(_C, name)) == stub_names(node.body), name


def test_functions_take_the_stubs_arguments_by_name() -> None:
    functions = {n.name: n for n in STUB.body if isinstance(n, ast.FunctionDef)}
    for name, node in functions.items():
        signature = getattr(_C, name).__doc__.splitlines()[0]
        assert signature.startswith(f"{name}(")
        expected = [argument.arg for argument in node.args.args]
        inside = signature[len(name) + 1 : signature.index(") ->")]
        assert [a.split(":")[0].strip() for a in inside.split(", ") if a] == expected, signature


@pytest.mark.parametrize(
    ("cls", "values"),
    [("DeviceInfo", ["avx2", 1, 2, 3, 4]), ("CudaInfo", [90, 132, 1 << 17, 1 << 16, 1 << 25, 8])],
)
def test_constructors_take_the_stubs_arguments_by_name(cls, values) -> None:
    init = next(
        n for n in stub_classes()[cls].body
        if isinstance(n, ast.FunctionDef) and n.name == "__init__"
    )  # fmt: skip
    names = [a.arg for a in init.args.args if a.arg != "self"]
    info = getattr(_C, cls)(**dict(zip(names, values, strict=True)))
    assert [getattr(info, name) for name in names] == values


def test_attributes_have_the_stubs_types() -> None:
    device, gpu = _C.cpu_device_info(1), _C.CudaInfo(90, 132, 1 << 17, 1 << 16, 1 << 25, 8)
    problem = (2, 3, 4, False, "float32", "train_forward", "none", False)
    kinds = {"str": str, "int": int, "bool": bool}
    for instance in (device, gpu, _C.plan(*problem, device), _C.plan_cuda(*problem, gpu)):
        for node in stub_classes()[type(instance).__name__].body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                value = getattr(instance, node.name)
                assert type(value) is kinds[ast.unparse(node.returns)], node.name


def test_compiled_names_belong_to_the_module() -> None:
    for name in stub_names(STUB.body):
        assert getattr(_C, name).__module__ == "bnext._C", name
    assert inspect.ismodule(_C)
