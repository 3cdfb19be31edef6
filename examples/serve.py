"""Serve an exported classifier: POST an image to /predict, get its most probable classes as JSON.

MODEL=photos.onnx uvicorn --app-dir examples serve:app      # pip install fastapi uvicorn onnxruntime pillow
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageOps

FILE = Path(os.environ.get("MODEL", "model.onnx"))
MODEL = json.loads(Path(f"{FILE}.json").read_text())  # written by hatnet-export
SESSION = onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"])
app = FastAPI()


def classify(content: bytes, top: int) -> list[dict[str, Any]]:
    """Decode, preprocess and classify one image."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    size, scale = MODEL["image_size"], MODEL["resize"] / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling[MODEL["interpolation"].upper()])
    left, top_edge = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top_edge, left + size, top_edge + size))) / 255
    normalised = ((pixels - MODEL["mean"]) / MODEL["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    logits = SESSION.run(None, {"image": normalised})[0][0]
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return [{"label": MODEL["classes"][i], "score": float(shares[i])} for i in shares.argsort()[::-1][:top]]


@app.post("/predict")
async def predict(request: Request, top: int = 5) -> list[dict[str, Any]]:
    """Answer with the ``top`` classes of the image in the body."""
    try:
        return await run_in_threadpool(classify, await request.body(), top)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise HTTPException(400, "the body must be an image") from error
