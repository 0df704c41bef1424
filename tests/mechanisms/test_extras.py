"""The line that installs an extra: its packages, wherever this package was installed from."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from lightning_compress.mechanisms import extras


@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_packages_of_one_extra(monkeypatch, quote):
    lines = [
        "torch>=2",
        f"a>=1,<2; extra == {quote}x{quote}",
        f"b; extra == {quote}x{quote}",
        f"c; extra == {quote}xy{quote}",
    ]
    monkeypatch.setattr(extras, "requires", lambda name: lines)
    assert extras.install_line("x") == 'pip install "a>=1,<2" "b"'


def test_a_checkout_that_was_not_installed(monkeypatch):
    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", nothing)
    assert extras.install_line("onnx") == 'pip install "lightning-compress[onnx]"'
