from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_compress.export import plain_state_dict

from .networks import NAMESPACES, lightning_module, loader, trainer


class Foreign:
    """Something that only unpickling could bring back."""


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("weights_only", [False, True])
def test_weights_of_a_real_checkpoint(tmp_path, namespace, weights_only):
    module, run = lightning_module(namespace), trainer(namespace, max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    weights = plain_state_dict(tmp_path / "last.ckpt")
    assert weights.keys() == module.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())
    lightning_module(namespace).load_state_dict(weights, strict=True)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "holds a list, not a Lightning checkpoint"),
        ({"weight": torch.ones(2)}, "already holds plain weights, not a Lightning checkpoint"),
        ({"epoch": 3, "model": {}}, r"no 'state_dict' of tensors in \['epoch', 'model'\]"),
        ({"state_dict": {"weight": 3}}, r"no 'state_dict' of tensors in \['state_dict'\]"),
        ({"state_dict": {"w": torch.ones(1)}, "extra": Foreign()}, "objects other than tensors.*Foreign.*if you trust"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, contents, message):
    torch.save(contents, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=message):
        plain_state_dict(tmp_path / "file.ckpt")


def test_no_such_file_folder_and_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt' does not exist"):
        plain_state_dict(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"is a directory.*format_utils dcp_to_torch FOLDER FILE"):
        plain_state_dict(tmp_path)
    damaged = "is damaged, or was not written to its end"
    other = r"is not a file that torch\.load can read: [^.]*$"
    for contents, what in ((b"", damaged), (b"just some text", other), (b"PK\x03\x04 broken", damaged)):
        (tmp_path / "text.ckpt").write_bytes(contents)
        with pytest.raises(ValueError, match=rf"text\.ckpt' {what}"):
            plain_state_dict(tmp_path / "text.ckpt")


@pytest.mark.slow
def test_weights_are_usable_without_this_package(tmp_path):
    module = torch.nn.Linear(2, 1)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    torch.save(plain_state_dict(tmp_path / "last.ckpt"), tmp_path / "plain.pt")
    code = (
        "import sys, torch; network = torch.nn.Linear(2, 1);"
        f"network.load_state_dict(torch.load({str(tmp_path / 'plain.pt')!r}, weights_only=True), strict=True);"
        "assert not any(name.startswith('lightning') for name in sys.modules); print(network.weight.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(module.weight.tolist())
