"""The backbone for other runtimes: ONNX and OpenVINO, float32, any batch, one input size."""

from __future__ import annotations

import warnings
from pathlib import Path

from trainer.model.checkpoint import load_backbone, read_config, write_config

INPUT, OUTPUT = "pixels", "embedding"


def export_onnx(checkpoint: Path, output: Path) -> None:
    """Write model.onnx: `pixels` (n, 3, s, s) float32, normalised, to `embedding` (n, d), and config.json beside it.

    Args:
        checkpoint: The folder.
        output: The folder to write.
    """
    import torch

    output.mkdir(parents=True, exist_ok=True)
    config, backbone = read_config(checkpoint), load_backbone(checkpoint)
    size = config.preprocess.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own libraries
        torch.onnx.export(
            backbone,
            (torch.zeros(2, 3, size, size),),
            output / "model.onnx",
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={"x": {0: torch.export.Dim("n")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    write_config(output, config.to_json())


def export_openvino(checkpoint: Path, output: Path) -> None:
    """Write model.xml and model.bin with the same input and output as `export_onnx`, and config.json beside them.

    Args:
        checkpoint: The folder.
        output: The folder to write.
    """
    import openvino
    import torch

    output.mkdir(parents=True, exist_ok=True)
    config, backbone = read_config(checkpoint), load_backbone(checkpoint)
    size = config.preprocess.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of shapes that are fixed here on purpose
        model = openvino.convert_model(backbone, example_input=torch.zeros(2, 3, size, size))
    model.reshape([-1, 3, size, size])
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    openvino.save_model(model, output / "model.xml", compress_to_fp16=False)
    write_config(output, config.to_json())
