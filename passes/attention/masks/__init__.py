"""What attention operators are told about a mask: a proof of its structure, or the tensor and its tile map."""
