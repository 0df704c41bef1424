from __future__ import annotations

from lightning_compress.report import Layer
from lightning_compress.report.profile import layer_panels


def layers(count):
    return [Layer(f"layer{index}", "Conv2d", index / count, 8 if index else 4, 16, 100) for index in range(count)]


def test_few_layers_have_a_line_each():
    zeros, bits = layer_panels(layers(4))
    assert (zeros.title, bits.title) == ("Zeros of each layer", "Bits of each layer")
    for part in (">layer0<", ">layer3<", ">75%<"):
        assert part in zeros.svg


def test_what_is_not_zero_is_told_apart():
    drawn = layer_panels([Layer("a", "Linear", 0.75, 32, 4, 1000), Layer("b", "Linear", 0.0, 32, 4, 500)])
    assert [panel.title for panel in drawn] == ["Parameters of each layer", "Zeros of each layer"]
    assert ">1.00 k (non-zero 250)<" in drawn[0].svg
    assert drawn[0].legend == "Thin bar: what is not zero."


def test_many_layers_are_one_profile_whose_peaks_are_named():
    zeros, bits = layer_panels(layers(150))
    assert zeros.legend == (
        "150 layers in the network's order. Most: layer149 (99.3%), layer148 (98.7%), layer147 (98%)."
    )
    assert bits.legend == "150 layers in the network's order. From 4 to 8."
    for part in (">layer0<", ">layer149<", ">99.3%<"):
        assert part in zeros.svg
    assert len(zeros.svg) < 16_000


def test_nothing_is_drawn_where_layers_do_not_differ_or_nothing_is_known():
    assert layer_panels([]) == []
    assert layer_panels([Layer("a", "Linear", 0.0, 32)]) == []
    assert layer_panels([Layer("a", "Linear", 0.0, 32), Layer("b", "Linear", 0.0, 32)]) == []
    some = layer_panels([Layer("a", "Linear", 0.0, 32, 7), Layer("b", "GRU", 0.0, 32, None)])
    assert [panel.title for panel in some] == ["Filters of each layer"]
