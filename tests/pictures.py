"""Data sets that tests make themselves: the same pictures and captions in every layout, and files that are broken."""

import csv
import io
import json
import struct
import zlib

import numpy as np
from PIL import Image


def some_pictures(count=50, seed=0):
    """Encoded pictures of several sizes and formats, each with a caption: {name: (bytes, caption)}."""
    rng = np.random.default_rng(seed)
    made = {}
    for number in range(count):
        height, width = (int(side) for side in rng.integers(20, 60, 2))
        corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        image = corners.resize((width, height), Image.Resampling.BICUBIC)
        kind = ("png", "jpg", "webp")[number % 3]
        made[f"{number:03}.{kind}"] = (encoded(image, kind), f"picture {number}, {width} by {height}, “größer”")
    return made


def broken_pictures():
    """A truncated picture, an empty one and a web page."""
    noise = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "jpg")
    return {"a.jpg": (noise[:-400], "a"), "b.png": (b"", "b"), "c.jpg": (b"<html>404</html>", "c")}


def encoded(image, kind="png", **options):
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "jpeg"}.get(kind, kind), **options)
    return buffer.getvalue()


def write_pictures(root, pictures):
    root.mkdir(parents=True, exist_ok=True)
    for name, (data, _) in pictures.items():
        (root / name).write_bytes(data)
    return root


def as_jsonl(root, pictures):
    write_pictures(root, pictures)
    rows = [{"file_name": name, "text": caption} for name, (_, caption) in pictures.items()]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return root


def as_csv(root, pictures):
    write_pictures(root, pictures)
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows((name, caption) for name, (_, caption) in pictures.items())
    return root


def as_sidecars(root, pictures):
    """In a folder that repeats nothing, with a sidecar each."""
    write_pictures(root / "1_things", pictures)
    for name, (_, caption) in pictures.items():
        (root / "1_things" / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return root


def as_dataset(root, pictures, streaming=False):
    """Saved by Hugging Face's datasets."""
    table_of(pictures).save_to_disk(root)
    return root


def as_parquet(root, pictures):
    root.mkdir(parents=True)
    table_of(pictures).to_parquet(root / "train-00000.parquet")
    return root


def table_of(pictures):
    import datasets

    datasets.disable_progress_bars()
    rows = [{"image": {"bytes": data, "path": name}, "text": caption} for name, (data, caption) in pictures.items()]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_list(rows, features=features)


def as_shards(root, pictures, size=20):
    """Written by webdataset itself; the folder's own name is braces of the shards."""
    import webdataset

    root.mkdir(parents=True)
    items = list(pictures.items())
    for shard in range(0, len(items), size):
        with webdataset.TarWriter(str(root / f"{shard // size:05}.tar")) as writer:
            for name, (data, caption) in items[shard : shard + size]:
                stem, kind = name.split(".")
                writer.write({"__key__": stem, kind: data, "txt": caption})
    return root


LAYOUTS = {
    "metadata.jsonl": as_jsonl,
    "metadata.csv": as_csv,
    "sidecars": as_sidecars,
    "saved table": as_dataset,
    "parquet": as_parquet,
    "shards": as_shards,
}


def png(values, bits, color_type, extra=b""):
    """A PNG by the specification, of whole samples (H, W, C) of 8 or 16 bits."""
    height, width = values.shape[:2]
    samples = values.astype({8: ">u1", 16: ">u2"}[bits]).reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *([(b"tRNS", extra)] if extra else []), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
