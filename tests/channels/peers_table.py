"""The table of kinds in docs/channels.md: `python -m tests.channels.peers_table` writes it anew."""

import pathlib

import jax

import rigl_jax as rx
from experiments import pages
from tests.channels import models, peers

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "channels.md"
PEERS = {
    "AlexNet, its LeNet": "lenet",
    "VGG 11 to 19, with and without BN": "vgg_bn",
    "ResNet 18, 34": "resnet",
    "ResNet 50, 101, 152, Wide-ResNet": "bottleneck",
    "ResNet for CIFAR (padded shortcut)": "padded_shortcut",
    "Pre-activation ResNet": "preact_resnet",
    "ResNeXt": "resnext",
    "RegNet-Y": "regnet",
    "SENet": "squeeze_excite",
    "DenseNet": "densenet",
    "SqueezeNet": "squeezenet",
    "GoogLeNet": "inception",
    "Inception v3, v4": "inception_v3",
    "NASNet, Xception": "xception",
    "MobileNet v2, MNASNet": "mobilenet_v2",
    "MobileNet v3": "mobilenet_v3",
    "EfficientNet": "efficientnet",
    "EfficientNet v2": "efficientnet_v2",
    "ShuffleNet": "shufflenet",
    "ShuffleNet v2 (not pruned there)": "shufflenet_v2",
    "ConvNeXt, unwrapped parameters": "convnext",
    "ViT": "vit",
    "Swin (an example of its own there)": "swin",
    "BERT": "bert",
    "Llama 2, 3, Qwen 2, 2.5, DeepSeek-R1 distilled": "llama",
    "Phi-3 (fused projections)": "gpt",
    "Segment Anything": "segment_anything",
    "Diffusion U-Nets": "diffusion",
    "Faster, Mask, Keypoint R-CNN": "mask_rcnn",
    "RetinaNet, FCOS": "retinanet",
    "SSD, SSDlite": "ssd",
    "YOLO v5, v7, v8": "yolo",
    "FCN, DeepLab v3": "deeplab",
    "LR-ASPP": "lraspp",
    "RAFT (not pruned there)": "raft",
    "DGCNN": "dgcnn",
    "GAT": "graph_attention",
    "test_cascaded_concat": "cascaded_concat",
    "test_concat": "wide_and_deep",
    "test_concat_split": "concat_split",
    "test_split": "shared_split",
    "test_non_feature_dim_cat": "other_axis",
    "test_reshape": "reshaped",
    "test_customized_layer, test_unused_parameters": "customized",
    "test_fully_connected_layers": "fc_residual",
    "test_multiple_inputs_and_outputs": "several_outputs",
    "test_single_channel_output, PReLU, InstanceNorm": "prelu_instance",
}
"""Its name of a kind, and ours."""


def row(theirs: str, kind: str, small: rx.channels.Compact) -> str:
    """A row of the table."""
    counts = [f"{before:,.0f} to {after:,.0f}" for before, after in (small.weights, small.macs)]
    return f"| {' | '.join([theirs, f'`{kind}`', *counts])} |\n"


def rows_of(kind: str, small: rx.channels.Compact) -> list[str]:
    """The rows of a kind, none where it is not among theirs."""
    return [row(theirs, ours, small) for theirs, ours in PEERS.items() if ours == kind]


def halved(kind: str) -> rx.channels.Compact:
    """A kind with half of the channels of every layer."""
    params, apply, x = (peers if kind in peers.NEW else models).make(kind)
    groups = rx.channels.groups(apply, params, x)
    keep = rx.channels.select(groups, rx.channels.scores(groups, params), remove=0.5, scope="layer")
    return rx.channels.shrink(apply, params, keep, x)


def main() -> None:
    """Writes the table."""
    head = "| theirs | ours | weights | multiply-accumulates |\n|---|---|---:|---:|\n"
    with jax.numpy_rank_promotion("allow"):
        body = head + "".join(row(theirs, kind, halved(kind)) for theirs, kind in PEERS.items())
    PAGE.write_text(pages.fill(PAGE.read_text(), "peers", lambda _: body))


if __name__ == "__main__":
    main()
