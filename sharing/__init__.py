"""How a trained network leaves this folder: as two plain files, as ONNX, as a site that draws, as a page to draw on."""
