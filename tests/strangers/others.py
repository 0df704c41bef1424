"""Tables, molecules, cells, sound and text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, TensorDataset

from .images import CLASSES, dicts
from .stranger import (
    BRANCH,
    DONE_TWICE,
    MANUAL,
    NO_FILTERS,
    NO_MAPS,
    SEVERAL_NETWORKS,
    Stranger,
    arguments,
    refused,
)

VOCABULARY = 50
TOKENS = {"input_embed_dim": 8, "num_heads": 2, "num_attn_blocks": 1}  # of the transformer for tables


def _table() -> pd.DataFrame:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(32, 3)), columns=["a", "b", "c"])
    return frame.assign(kind=np.tile(["x", "y"], 16), label=random.integers(0, 2, 32).astype(str))


def _tabular(config: str, **settings: Any) -> tuple[Any, Any]:
    """A module, and its data, as the package makes both from a table."""
    import pytorch_tabular
    from pytorch_tabular import models
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

    columns = {"continuous_cols": ["a", "b", "c"], "categorical_cols": ["kind"]}
    tabular = pytorch_tabular.TabularModel(
        data_config=DataConfig(target=["label"], num_workers=0, **columns),
        model_config=getattr(models, config)(task="classification", **settings),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=8, progress_bar="none"),
        verbose=False,
        suppress_lightning_logger=True,
    )
    data = tabular.prepare_dataloader(train=_table(), validation=_table(), seed=0)
    return tabular.prepare_model(data), data


def _molecules() -> DataLoader:
    from chemprop import data

    points = [
        data.MoleculeDatapoint.from_smi(text, np.array([float(len(text))]))
        for text in ("CCO", "CCN", "CCC", "CC(=O)O", "c1ccccc1", "CCCl", "COC", "CCBr") * 2
    ]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=4, shuffle=False)


def _chemprop() -> Any:
    from chemprop import models
    from chemprop import nn as layers

    return models.MPNN(
        layers.BondMessagePassing(d_h=16), layers.MeanAggregation(), layers.RegressionFFN(input_dim=16, hidden_dim=16)
    )


def _scvi() -> Any:
    from scvi.module import VAE
    from scvi.train import TrainingPlan

    plan = TrainingPlan(VAE(n_input=20, n_batch=1, n_hidden=16, n_latent=4))
    plan.n_obs_training = plan.n_obs_validation = 16
    return plan


def _cells() -> DataLoader:
    return dicts(
        X=torch.randint(0, 20, (16, 20)).float(),
        batch=torch.zeros(16, 1),
        labels=torch.zeros(16, 1),
    )


def _asteroid() -> Any:
    from asteroid.engine.system import System
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.models import ConvTasNet

    network = ConvTasNet(
        n_src=2, n_blocks=2, n_repeats=1, bn_chan=8, hid_chan=16, skip_chan=8, n_filters=16, kernel_size=16, stride=8
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    return System(network, optimizer, PITLossWrapper(pairwise_neg_sisdr), _mixtures(), _mixtures())


def _mixtures() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 400), torch.randn(16, 2, 400)), batch_size=4)


def _pyannote() -> Any:
    """Voice activity detection; the layers that depend on the task are made when a fit starts."""
    from pyannote.audio.core.task import Problem, Resolution, Specifications, Task
    from pyannote.audio.models.segmentation import PyanNet

    class Voices(Task):
        """What a user of the package writes: the data, which here comes from elsewhere."""

        def __init__(self) -> None:
            self.duration, self.warm_up, self._metric = 0.5, (0.0, 0.0), {}
            self.specifications = Specifications(
                problem=Problem.BINARY_CLASSIFICATION,
                resolution=Resolution.FRAME,
                duration=self.duration,
                classes=["speech"],
            )

        def setup(self, stage: str | None = None) -> None:
            """Nothing to read."""

        def prepare_data(self) -> None:
            """Nothing to prepare."""

    lstm = {"hidden_size": 8, "num_layers": 1, "bidirectional": True, "monolithic": True}
    return PyanNet(sincnet={"stride": 10}, lstm=lstm, linear={"hidden_size": 8, "num_layers": 1}, task=Voices())


def _pyannote_teacher() -> Any:
    teacher = _pyannote()
    teacher.setup()
    return teacher


def _voices() -> DataLoader:
    return dicts(X=torch.randn(16, 1, 8000), y=torch.randint(0, 2, (16, 26, 1)))


def _terratorch() -> Any:
    from terratorch.tasks import SemanticSegmentationTask

    return SemanticSegmentationTask(
        model_factory="EncoderDecoderFactory",
        model_args={
            "backbone": "timm_test_resnet",
            "backbone_pretrained": False,
            "backbone_out_indices": [0, 1, 2, 3],
            "decoder": "FCNDecoder",
            "decoder_channels": 16,
            "num_classes": CLASSES,
        },
        ignore_index=-1,
        plot_on_val=False,
    )


def _demo(name: str) -> Any:
    from lightning.pytorch import demos

    return getattr(demos, name)(VOCABULARY)


def _tokens() -> DataLoader:
    return DataLoader(TensorDataset(*torch.randint(VOCABULARY, (2, 16, 6))), batch_size=4)


def _boring(name: str) -> Any:
    from lightning.pytorch.demos import boring_classes

    return getattr(boring_classes, name)()


def _noise() -> DataLoader:
    return DataLoader(torch.randn(16, 32), batch_size=4)


STRANGERS = (
    Stranger(
        "pytorch-tabular",
        "CategoryEmbeddingModel",
        "table",
        lambda: _tabular("CategoryEmbeddingModelConfig", layers="16-8")[0],
        lambda: _tabular("CategoryEmbeddingModelConfig", layers="16-8")[1].train_dataloader(),
        arguments=arguments(linear=True),
        refuses=refused(NO_MAPS, "AttentionTransferCallback", "FactorTransferCallback"),
        lightning="pytorch_lightning",
    ),
    Stranger(
        "pytorch-tabular",
        "FTTransformerModel",
        "table",
        lambda: _tabular("FTTransformerConfig", **TOKENS)[0],
        lambda: _tabular("FTTransformerConfig", **TOKENS)[1].train_dataloader(),
        refuses={"FactorTransferCallback": NO_MAPS, "DCILCallback": DONE_TWICE},
        arguments=arguments(linear=True),
        lightning="pytorch_lightning",
    ),
    Stranger(
        "chemprop",
        "MPNN",
        "graph",
        _chemprop,
        _molecules,
        arguments=arguments(
            regression=True,
            linear=True,
            DistillationCallback={"student": ["message_passing", "predictor.ffn"]},
            PTQCallback={"network": "predictor.ffn"},
            QATCallback={"network": "predictor.ffn"},
            ExportCallback={"network": "predictor.ffn"},
            StructuredPruningCallback={"exclude": ["message_passing.W_i"]},
        ),
        refuses=refused(SEVERAL_NETWORKS, "AttentionTransferCallback", "FactorTransferCallback"),
    ),
    Stranger(
        "scvi-tools",
        "TrainingPlan",
        "VAE",
        _scvi,
        _cells,
        "module",
        arguments=arguments(regression=True, linear=True),
        refuses={
            "DistillationCallback": r"the student returns tuple of dict, dict, LossOutput .*; say which one holds",
            **refused(NO_MAPS, "AttentionTransferCallback", "FactorTransferCallback"),
            "DCILCallback": DONE_TWICE,
            "ExportCallback": BRANCH,
        },
    ),
    Stranger(
        "asteroid",
        "System",
        "sound separation",
        _asteroid,
        _mixtures,
        arguments=arguments(
            regression=True,
            DCILCallback={"exclude": ["model.masker.mask_net.1"]},
            StructuredPruningCallback={"exclude": ["model.masker.bottleneck.1"]},
        ),
        refuses={
            "ExportCallback": r"ConvTasNet cannot be exported because of a number that Python takes from a tensor"
        },
        trainer={"logger": True},
        lightning="pytorch_lightning",
    ),
    Stranger(
        "pyannote.audio",
        "PyanNet",
        "voice detection",
        _pyannote,
        _voices,
        teacher=_pyannote_teacher,
        arguments=arguments(regression=True),
        refuses={
            **refused(NO_MAPS, "AttentionTransferCallback", "FactorTransferCallback"),
            "ExportCallback": r"cannot be exported: .*aten\.clamp .*name a part of the network that does without",
        },
    ),
    Stranger(
        "terratorch",
        "SemanticSegmentationTask",
        "segmentation",
        _terratorch,
        lambda: dicts(image=torch.rand(16, 3, 32, 32), mask=torch.randint(CLASSES, (16, 32, 32))),
        arguments=arguments(DCILCallback={"exclude": ["model.head.head.2"]}),
    ),
    Stranger(
        "lightning",
        "LightningTransformer",
        "language",
        lambda: _demo("LightningTransformer"),
        _tokens,
        arguments=arguments(linear=True),
        refuses=refused(NO_MAPS, "FactorTransferCallback"),
        validates=False,
    ),
    Stranger(
        "lightning",
        "LightningLSTM",
        "language",
        lambda: _demo("LightningLSTM"),
        _tokens,
        "model",
        arguments=arguments(
            linear=True,
            DistillationCallback={"output": 0},
            DCILCallback={"output": 0},
            ExportCallback={"dynamic_batch": False},
        ),
        refuses={"FactorTransferCallback": NO_MAPS, "StructuredPruningCallback": NO_FILTERS},
        validates=False,
    ),
    Stranger(
        "lightning",
        "BoringModel",
        "one layer",
        lambda: _boring("BoringModel"),
        _noise,
        arguments=arguments(linear=True),
        refuses={
            **refused(NO_MAPS, "AttentionTransferCallback", "FactorTransferCallback"),
            "StructuredPruningCallback": NO_FILTERS,
        },
    ),
    Stranger(
        "lightning",
        "ManualOptimBoringModel",
        "manual optimisation",
        lambda: _boring("ManualOptimBoringModel"),
        _noise,
        refuses=MANUAL,
    ),
)
