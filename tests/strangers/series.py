"""Forecasting: batches of dicts, tuples with gaps, windows that are drawn in the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from .stranger import BRANCH, DONE_TWICE, NO_FILTERS, NO_MAPS, NUMBER, SEVERAL_NETWORKS, Stranger, arguments, refused

HISTORY, HORIZON = 8, 4


def _frame() -> pd.DataFrame:
    frame = pd.DataFrame({"group": np.repeat(["a", "b"], 40), "time": np.tile(np.arange(40), 2)})
    frame["value"] = np.sin(frame["time"]) + (frame["group"] == "a")
    return frame


def _series() -> Any:
    from pytorch_forecasting import TimeSeriesDataSet

    return TimeSeriesDataSet(
        _frame(),
        time_idx="time",
        target="value",
        group_ids=["group"],
        max_encoder_length=HISTORY,
        max_prediction_length=HORIZON,
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )


def _forecaster(name: str, **settings: Any) -> Any:
    import pytorch_forecasting
    from pytorch_forecasting.metrics import QuantileLoss

    settings = {"learning_rate": 0.01, "log_interval": -1, **settings}
    if name != "RecurrentNetwork":
        settings["loss"] = QuantileLoss([0.1, 0.5, 0.9])
    return getattr(pytorch_forecasting, name).from_dataset(_series(), **settings)


def _forecasts() -> DataLoader:
    return _series().to_dataloader(train=True, batch_size=8, num_workers=0)


def _gluonts(module: str, name: str, **arguments: Any) -> Any:
    from importlib import import_module

    kind = getattr(import_module(f"gluonts.torch.model.{module}.lightning_module"), name)
    return kind(model_kwargs={"prediction_length": HORIZON, "context_length": HISTORY, **arguments})


def _gluonts_batches(rows: int = 32, *, features: bool = False) -> DataLoader:
    columns = {
        "past_target": torch.randn(rows, HISTORY),
        "past_observed_values": torch.ones(rows, HISTORY),
        "future_target": torch.randn(rows, HORIZON),
        "future_observed_values": torch.ones(rows, HORIZON),
    }
    if features:  # of DeepAR, whose past is longer by the largest lag
        columns |= {
            "past_target": torch.randn(rows, HISTORY + 2),
            "past_observed_values": torch.ones(rows, HISTORY + 2),
            "feat_static_cat": torch.zeros(rows, 1, dtype=torch.long),
            "feat_static_real": torch.zeros(rows, 1),
            "past_time_feat": torch.randn(rows, HISTORY + 2, 1),
            "future_time_feat": torch.randn(rows, HORIZON, 1),
        }
    return DataLoader([{key: value[row] for key, value in columns.items()} for row in range(rows)], batch_size=8)


def _neuralforecast(name: str, **arguments: Any) -> Any:
    from neuralforecast import models

    module = getattr(models, name)(
        h=HORIZON, input_size=HISTORY, max_steps=10, windows_batch_size=8, valid_batch_size=2, **arguments
    )
    module.val_size, module.test_size = HORIZON, 0
    return module


def _windows() -> DataLoader:
    from neuralforecast.tsdataset import TimeSeriesDataset, TimeSeriesLoader

    frame = _frame().rename(columns={"group": "unique_id", "time": "ds", "value": "y"})
    dataset, *_ = TimeSeriesDataset.from_df(frame)
    return TimeSeriesLoader(dataset, batch_size=1)


def _darts(module: str, name: str, **arguments: Any) -> Any:
    from importlib import import_module

    kind = getattr(import_module(f"darts.models.forecasting.{module}"), name)
    return kind(
        input_chunk_length=HISTORY,
        output_chunk_length=HORIZON,
        train_sample_shape=((HISTORY, 1), None, None, None, None, (HORIZON, 1)),
        nr_params=1,
        **arguments,
    )


def _darts_batches(length: int = HORIZON) -> DataLoader:
    def together(rows: list[Any]) -> tuple[Any, ...]:
        past, future = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return (past, None, None, None, None, None, future)

    rows = list(zip(torch.randn(32, HISTORY, 1), torch.randn(32, length, 1), strict=True))
    return DataLoader(rows, batch_size=8, collate_fn=together)


WITHOUT_MAPS = refused(NO_MAPS, "AttentionTransferCallback", "FactorTransferCallback")

STRANGERS = (
    Stranger(
        "pytorch-forecasting",
        "DecoderMLP",
        "forecasting",
        lambda: _forecaster("DecoderMLP", hidden_size=8),
        _forecasts,
        arguments=arguments(regression=True, linear=True, DistillationCallback={"output": "prediction"}),
        refuses={**WITHOUT_MAPS, "DCILCallback": DONE_TWICE},
    ),
    Stranger(
        "pytorch-forecasting",
        "RecurrentNetwork",
        "forecasting",
        lambda: _forecaster("RecurrentNetwork", hidden_size=8),
        _forecasts,
        arguments=arguments(regression=True, linear=True, DistillationCallback={"output": "prediction"}),
        refuses={
            **WITHOUT_MAPS,
            "DCILCallback": DONE_TWICE,
            "StructuredPruningCallback": NO_FILTERS,
            "ExportCallback": BRANCH,
        },
    ),
    Stranger(
        "pytorch-forecasting",
        "TemporalFusionTransformer",
        "forecasting",
        lambda: _forecaster("TemporalFusionTransformer", hidden_size=8, hidden_continuous_size=4),
        _forecasts,
        arguments=arguments(
            regression=True,
            linear=True,
            DistillationCallback={"output": "prediction"},
            StructuredPruningCallback={"time_limit": 5.0},
        ),
        refuses={
            "FactorTransferCallback": NO_MAPS,
            "DCILCallback": DONE_TWICE,
            "StructuredPruningCallback": r"was stopped after time_limit=5\.0 s .*: give it more, or name a part",
            "ExportCallback": NUMBER,
        },
    ),
    Stranger(
        "gluonts",
        "PatchTSTLightningModule",
        "forecasting",
        lambda: _gluonts(
            "patch_tst",
            "PatchTSTLightningModule",
            patch_len=4,
            stride=2,
            padding_patch="end",
            d_model=8,
            nhead=2,
            dim_feedforward=16,
            num_feat_dynamic_real=0,
            dropout=0.0,
            activation="relu",
            norm_first=False,
            num_encoder_layers=1,
            scaling="mean",
        ),
        _gluonts_batches,
        "model",
        arguments=arguments(
            regression=True, linear=True, StructuredPruningCallback={"exclude": ["type:MultiheadAttention"]}
        ),
        refuses={
            "DistillationCallback": r"the student returns tuple of tuple, Tensor, Tensor .*; say which one holds",
            "FactorTransferCallback": NO_MAPS,
        },
    ),
    Stranger(
        "gluonts",
        "DeepARLightningModule",
        "forecasting",
        lambda: _gluonts("deepar", "DeepARLightningModule", freq="D", hidden_size=8, lags_seq=[1, 2]),
        lambda: _gluonts_batches(features=True),
        arguments=arguments(
            regression=True,
            linear=True,
            PTQCallback={"network": "model.param_proj"},
            QATCallback={"network": "model.param_proj"},
            ExportCallback={"network": "model.param_proj"},
        ),
        refuses={
            **refused(SEVERAL_NETWORKS, "DistillationCallback", "AttentionTransferCallback", "FactorTransferCallback"),
            "StructuredPruningCallback": NO_FILTERS,
        },
    ),
    Stranger(
        "neuralforecast",
        "NHITS",
        "forecasting",
        lambda: _neuralforecast("NHITS", mlp_units=[[16, 16]] * 3),
        _windows,
        arguments=arguments(regression=True, linear=True),
        refuses={**WITHOUT_MAPS, "DCILCallback": DONE_TWICE},
        lightning="pytorch_lightning",
    ),
    Stranger(
        "neuralforecast",
        "TCN",
        "forecasting",
        lambda: _neuralforecast("TCN", encoder_hidden_size=8, decoder_hidden_size=8),
        _windows,
        arguments=arguments(
            regression=True, StructuredPruningCallback={"exclude": ["context_adapter", "hist_encoder.tcn.4.conv"]}
        ),
        refuses={**WITHOUT_MAPS, "DCILCallback": DONE_TWICE},
        lightning="pytorch_lightning",
    ),
    Stranger(
        "u8darts",
        "_NBEATSModule",
        "forecasting",
        lambda: _darts(
            "nbeats",
            "_NBEATSModule",
            input_dim=1,
            output_dim=1,
            generic_architecture=True,
            num_stacks=2,
            num_blocks=1,
            num_layers=2,
            layer_widths=[16, 16],
            expansion_coefficient_dim=4,
            trend_polynomial_degree=2,
            batch_norm=False,
            dropout=0.0,
            activation="ReLU",
        ),
        _darts_batches,
        arguments=arguments(
            regression=True,
            linear=True,
            StructuredPruningCallback={"exclude": ["*.backcast_g"]},
        ),
        refuses=WITHOUT_MAPS,
        lightning="pytorch_lightning",
    ),
    Stranger(
        "u8darts",
        "_TCNModule",
        "forecasting",
        lambda: _darts(
            "tcn_model",
            "_TCNModule",
            input_size=1,
            kernel_size=3,
            num_filters=8,
            num_layers=2,
            dilation_base=2,
            target_size=1,
            target_length=HORIZON,
            weight_norm=True,
            dropout=0.0,
        ),
        lambda: _darts_batches(HISTORY),
        arguments=arguments(regression=True),
        refuses=WITHOUT_MAPS
        | refused(
            r"the layer 'res_blocks\.0\.conv1' computes its weight from other parameters .*make it plain again",
            "PSGDCallback",
            "PruningCallback",
            "DPFCallback",
            "DCILCallback",
            "StructuredPruningCallback",
        ),
        lightning="pytorch_lightning",
    ),
)
