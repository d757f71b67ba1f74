"""A checkpoint's backbone for others: ONNX and OpenVINO (float32, any batch, one input size), and the hub's layout."""

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.files import write_atomically
from trainer.hub.vit_names import HubError, to_transformers
from trainer.model.checkpoint import load_backbone, read_config, read_weights, write_config
from trainer.model.vit_openvino import INPUT, OUTPUT, NotPlain, build_graph, refuse_telemetry


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

    Raises:
        HubError: The backbone is no plain ViT.
    """
    refuse_telemetry()
    import openvino

    config = read_config(checkpoint)
    try:
        graph = build_graph(config, read_weights(checkpoint))
    except NotPlain as error:
        raise HubError(f"only a plain ViT can be exported to OpenVINO ({error}): use --format onnx") from error
    output.mkdir(parents=True, exist_ok=True)
    graph.inputs[0].get_tensor().set_names({INPUT})
    openvino.save_model(graph, output / "model.xml", compress_to_fp16=False)
    write_config(output, config.to_json())


def export_hub(checkpoint: Path, output: Path) -> None:
    """Write the hub's layout: config.json, model.safetensors and preprocessor_config.json for `ViTModel`.

    A checkpoint whose image size is not that of its position embeddings needs `interpolate_pos_encoding` there, and
    transformers interpolates a little differently.

    Args:
        checkpoint: The folder.
        output: The folder to write.

    Raises:
        HubError: The backbone is no plain ViT.
    """
    from safetensors.numpy import save

    config, backbone, state = read_config(checkpoint), load_backbone(checkpoint), read_weights(checkpoint)
    blocks: Any = backbone.blocks
    patch = int(backbone.patch_embed.patch_size[0])  # type: ignore[index, union-attr]
    hub = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": config.dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": blocks[0].norm1.eps,
        "image_size": patch * math.isqrt(state["pos_embed"].shape[1] - 1),
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": blocks[0].attn.qkv.bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "lineup": {
            "name": config.name,
            "image_size": config.image_size,
            "preprocess": asdict(config.preprocess),
            "training": config.training,
            "provenance": config.provenance,
            "licence": config.licence,
        },
    }
    size = config.preprocess.image_size
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": config.preprocess.mode == "resize_crop",
        "size": {"shortest_edge": round(size * 248 / 224)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.preprocess.mean),
        "image_std": list(config.preprocess.std),
    }
    write_atomically(output / "model.safetensors", save(to_transformers(state), {"format": "pt"}))
    write_atomically(output / "config.json", json.dumps(hub, indent=2).encode())
    write_atomically(output / "preprocessor_config.json", json.dumps(processor, indent=2).encode())
