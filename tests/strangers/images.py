"""Networks for images: classification, segmentation, detection, self-supervision, anomalies, uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .stranger import BRANCH, MANUAL, NO_FILTERS, SEVERAL_NETWORKS, Stranger, arguments, refused

CLASSES = 4
SIZE = 64  # of the images for anomalib


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """What routines of torch-uncertainty are given."""
    return torch.optim.SGD(model.parameters(), lr=0.05)


def images(*, size: int = 8, dense: bool = False, rows: int = 16) -> DataLoader:
    """Pairs of images and labels."""
    x = torch.randn(rows, 3, size, size)
    y = torch.randint(CLASSES, (rows, size, size) if dense else (rows,))
    return DataLoader(TensorDataset(x, y), batch_size=4)


def dicts(collate: Callable[[list[Any]], Any] | None = None, **columns: torch.Tensor) -> DataLoader:
    """Batches that are dicts."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return DataLoader(rows, batch_size=4, collate_fn=collate)


def backbone(width: int = 6) -> nn.Sequential:
    """Features of images."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Encoder(nn.Module):
    """Feature maps of two sizes, with the attributes that a VAE of lightning-uq-box reads."""

    out_channels, reductions = (8, 16), (2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.first(x).relu()
        return [x, self.second(x).relu()]


def classifier(width: int = 6) -> nn.Sequential:
    """Classes of images."""
    return nn.Sequential(*backbone(width), nn.Linear(width, CLASSES))


def _lightly(name: str) -> Any:
    from lightly.utils.benchmarking import linear_classifier

    kind = getattr(linear_classifier, name)
    return kind(backbone(), 256, lr=0.1, feature_dim=6, num_classes=CLASSES, topk=(1,))


def _routine(name: str, network: nn.Module) -> Any:
    from torch_uncertainty import routines

    return getattr(routines, name)(network, CLASSES, nn.CrossEntropyLoss(), optim_recipe=sgd)


def _torchgeo(name: str, **arguments: Any) -> Any:
    from torchgeo import trainers

    return getattr(trainers, name)(weights=None, **arguments)


def _boxes() -> DataLoader:
    def together(rows: list[Any]) -> dict[str, Any]:
        batch = {key: [row[key] for row in rows] for key in rows[0]}
        return {**batch, "image": torch.stack(batch["image"])}

    corners = torch.tensor([[2.0, 2.0, 20.0, 20.0], [4.0, 6.0, 25.0, 30.0]])
    return dicts(
        together,
        image=torch.rand(8, 3, 32, 32),
        bbox_xyxy=corners.expand(8, 2, 4),
        label=torch.randint(1, CLASSES, (8, 2)),
    )


def _anomalib(name: str, **arguments: Any) -> Any:
    from anomalib.models import image
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Resize

    others = {"post_processor": False, "evaluator": False, "visualizer": False}
    return getattr(image, name)(pre_processor=PreProcessor(transform=Resize((SIZE, SIZE))), **others, **arguments)


def _anomalies() -> DataLoader:
    from anomalib.data import ImageBatch

    def together(rows: list[Any]) -> Any:
        return ImageBatch(
            image=torch.stack([row["image"] for row in rows]), gt_label=torch.zeros(len(rows), dtype=bool)
        )

    return dicts(together, image=torch.rand(16, 3, SIZE, SIZE))


def _uq(name: str, **arguments: Any) -> Any:
    from lightning_uq_box import uq_methods

    return getattr(uq_methods, name)(**arguments)


def _regression() -> DataLoader:
    return dicts(input=torch.randn(16, 3, 8, 8), target=torch.randn(16, 1))


STRANGERS = (
    Stranger(
        "lightly",
        "FinetuneClassifier",
        "fine-tuning",
        lambda: _lightly("FinetuneClassifier"),
        images,
        lightning="pytorch_lightning",
    ),
    Stranger(
        "lightly",
        "LinearClassifier",
        "linear probe",
        lambda: _lightly("LinearClassifier"),
        images,
        refuses={
            **refused(
                r"what the student's layer '.*' returns carries no gradient, so nothing could be learned",
                "AttentionTransferCallback",
                "FactorTransferCallback",
            ),
            "StructuredPruningCallback": NO_FILTERS,
        },
        lightning="pytorch_lightning",
    ),
    Stranger(
        "torch-uncertainty",
        "ClassificationRoutine",
        "uncertainty",
        lambda: _routine("ClassificationRoutine", classifier()),
        images,
        "model",
        lambda: classifier(12),
    ),
    Stranger(
        "torch-uncertainty",
        "SegmentationRoutine",
        "segmentation",
        lambda: _routine(
            "SegmentationRoutine",
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 3, padding=1)),
        ),
        lambda: images(dense=True),
        "model",
        arguments=arguments(DCILCallback={"exclude": ["model.2"]}),
    ),
    Stranger(
        "torchgeo",
        "ClassificationTask",
        "classification",
        lambda: _torchgeo("ClassificationTask", model="test_resnet", num_classes=CLASSES),
        lambda: dicts(image=torch.rand(16, 3, 32, 32), label=torch.randint(CLASSES, (16,))),
    ),
    Stranger(
        "torchgeo",
        "SemanticSegmentationTask",
        "segmentation",
        lambda: _torchgeo("SemanticSegmentationTask", model="unet", backbone="tu-test_resnet", num_classes=CLASSES),
        lambda: dicts(image=torch.rand(16, 3, 32, 32), mask=torch.randint(CLASSES, (16, 32, 32))),
        arguments=arguments(DCILCallback={"exclude": ["model.segmentation_head.0"]}),
    ),
    Stranger(
        "torchgeo",
        "ObjectDetectionTask",
        "detection",
        lambda: _torchgeo("ObjectDetectionTask", model="retinanet", backbone="resnet18", num_classes=CLASSES),
        _boxes,
        arguments=arguments(
            regression=True,
            DistillationCallback={"output": "classification"},
            DCILCallback={"exclude": ["model.head.regression_head.bbox_reg"]},
            StructuredPruningCallback={"layers": ["model.head.*"]},
            ExportCallback={"dynamic_batch": False},
        ),
        refuses={
            "DistillationCallback": r"output='classification' is not in the teacher's output, which is list of dict",
            "ExportCallback": BRANCH,
        },
    ),
    Stranger(
        "torchgeo",
        "BYOLTask",
        "self-supervision",
        lambda: _torchgeo("BYOLTask", model="test_resnet"),
        lambda: dicts(image=torch.rand(16, 3, 32, 32)),
        arguments=arguments(
            PTQCallback={"network": "model.predictor"},
            QATCallback={"network": "model.predictor"},
            ExportCallback={"network": "model.predictor"},
        ),
        refuses={
            **refused(
                SEVERAL_NETWORKS,
                "DistillationCallback",
                "AttentionTransferCallback",
                "FactorTransferCallback",
                "DCILCallback",
            ),
            **refused(
                r"training_step calls 'model.predictor', and validation_step does not, .*network=",
                "PTQCallback",
                "QATCallback",
            ),
        },
    ),
    Stranger(
        "anomalib",
        "Fastflow",
        "anomaly detection",
        lambda: _anomalib("Fastflow", backbone="resnet18", pre_trained=False, flow_steps=2),
        _anomalies,
        "model",
        arguments=arguments(
            regression=True, DCILCallback={"exclude": ["model.fast_flow_blocks.2.module_list.1.subnet.2"]}
        ),
        refuses={
            "DistillationCallback": r"the student returns tuple of list, list with 6 floating tensors; say which one",
            "AttentionTransferCallback": r"'feature_extractor.layer3' returns carries no gradient, .*is it frozen",
            "StructuredPruningCallback": r"the structure of the network cannot be told: .*PruningCallback, .*, works",
        },
    ),
    Stranger(
        "anomalib",
        "Ganomaly",
        "GAN",
        lambda: _anomalib("Ganomaly", batch_size=4, n_features=8, latent_vec_size=8),
        _anomalies,
        arguments=arguments(PTQCallback={"network": "model.generator"}, ExportCallback={"network": "model.generator"}),
        refuses=MANUAL,
    ),
    Stranger(
        "lightning-uq-box",
        "MCDropoutRegression",
        "uncertainty",
        lambda: _uq(
            "MCDropoutRegression",
            model=nn.Sequential(*backbone(), nn.Dropout(0.1), nn.Linear(6, 1)),
            num_mc_samples=3,
            loss_fn=nn.MSELoss(),
        ),
        _regression,
        arguments=arguments(regression=True),
    ),
    Stranger(
        "lightning-uq-box",
        "VAE",
        "VAE",
        lambda: _uq(
            "VAE",
            encoder=Encoder(),
            latent_size=4,
            num_samples=2,
            out_channels=3,
            img_size=16,
            decoder_channels=[16, 8, 8],
        ),
        lambda: dicts(input=torch.rand(16, 3, 16, 16), target=torch.rand(16, 3, 16, 16)),
        arguments=arguments(
            regression=True, DistillationCallback={"output": 0}, DCILCallback={"exclude": ["decoder.blocks.2.0"]}
        ),
        refuses={"ExportCallback": r"of the file differs by .*: the forward may draw random numbers in evaluation"},
    ),
)
