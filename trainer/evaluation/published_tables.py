"""The published tables of CoDE (poster and paper, arXiv 2407.20337), accuracy in percent.

Printed beside ours only for the same test set: D3's.
"""

SEEN_COLUMNS = (
    "plain overall", "plain real", "plain fake", "transformed overall", "transformed real", "transformed fake",
)  # fmt: skip
"""D3's test set; D3's four generators follow, of the transformed images."""
SEEN_ACCURACIES: dict[str, tuple[float, ...]] = {
    "Wang et al. (RN50, blur+JPEG 0.5)": (20.7, 99.4, 1.0, 20.8, 99.2, 1.2, 0.9, 1.6, 1.2, 1.4),
    "Wang et al. (RN50, blur+JPEG 0.1)": (21.4, 98.7, 2.0, 21.6, 98.2, 2.5, 2.2, 2.8, 2.1, 2.8),
    "Gragnaniello et al.": (21.8, 99.7, 2.3, 21.8, 99.5, 2.3, 1.4, 4.2, 1.5, 2.1),
    "Corvi et al.": (75.9, 99.2, 70.1, 64.1, 99.2, 55.4, 8.1, 84.1, 76.0, 53.3),
    "Ojha et al.": (31.0, 96.1, 14.8, 37.7, 87.0, 25.4, 11.3, 24.5, 19.0, 46.8),
    "Wang et al. (DIRE)": (79.7, 10.0, 97.1, 76.5, 15.8, 91.7, 89.6, 92.4, 91.5, 93.1),
    "ViT-T (BCE)": (97.0, 91.4, 98.4, 93.7, 93.8, 93.6, 92.1, 93.5, 92.7, 96.4),
    "CoDE (Linear)": (98.0, 94.0, 99.0, 95.7, 95.6, 95.8, 94.8, 95.8, 94.9, 97.5),
    "CoDE (NN)": (97.3, 89.3, 99.3, 95.8, 90.5, 97.1, 96.6, 97.3, 96.6, 98.1),
    "CoDE (SVM)": (91.3, 74.4, 95.4, 92.5, 81.0, 95.4, 96.6, 91.7, 94.4, 99.0),
    # Ablations.
    "global only, real anchors (Linear)": (87.7, 74.9, 90.9, 83.5, 75.3, 85.6, 80.7, 84.6, 86.5, 90.5),
    "global only, pre-trained (Linear)": (87.3, 93.8, 85.7, 86.2, 92.9, 84.5, 94.0, 76.6, 76.7, 91.0),
    "global only, real anchors (NN)": (76.2, 75.1, 76.5, 73.9, 75.3, 73.5, 68.3, 70.3, 73.9, 81.5),
    "global only, pre-trained (NN)": (96.1, 86.8, 98.4, 94.2, 86.5, 96.2, 95.3, 96.0, 95.4, 98.0),
    "global only, real anchors (SVM)": (80.1, 86.7, 78.5, 74.9, 86.2, 72.1, 66.2, 67.8, 71.2, 83.4),
    "global only, pre-trained (SVM)": (89.2, 46.4, 99.9, 89.1, 46.0, 99.9, 99.9, 99.9, 99.9, 99.9),
}
UNSEEN_COLUMNS = (
    "Guided", "LDM 200", "LDM 200 CFG", "LDM 100", "GLIDE 100 27", "GLIDE 50 27", "GLIDE 100 10", "DALL-E v1", "v2",
    "v3", "Midjourney", "average",
)  # fmt: skip
UNSEEN_ACCURACIES: dict[str, tuple[float, ...]] = {
    "Corvi et al.": (52.1, 99.3, 99.3, 99.3, 58.0, 59.1, 62.3, 89.4, 49.6, 82.9, 98.3, 77.2),
    "Ojha et al.": (69.5, 94.4, 74.0, 95.0, 78.5, 79.1, 77.9, 87.3, 60.1, 53.5, 53.9, 74.8),
    "Wang et al. (DIRE)": (56.7, 62.6, 61.3, 62.2, 63.2, 63.4, 63.1, 63.0, 63.4, 60.7, 62.3, 62.0),
    "CoDE (Linear)": (53.5, 92.5, 95.6, 91.9, 71.7, 75.4, 72.9, 63.1, 71.4, 86.7, 84.0, 78.0),
    "CoDE (NN)": (53.5, 92.7, 96.1, 92.5, 73.8, 76.9, 74.0, 67.0, 74.3, 88.6, 86.8, 79.6),
    "CoDE (SVM)": (54.6, 91.0, 90.4, 90.9, 77.2, 78.8, 77.6, 76.1, 80.2, 91.0, 89.7, 81.6),
}
