"""Use a student with plain diffusers: nothing of fewstep is imported.

    python examples/05_plain_diffusers.py runs/digits/student

Without an argument it takes the packaged digits teacher, asked once: its pictures are then averages, because a
teacher is no student. It writes digits.png and counts the calls of the network.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from diffusers import ConsistencyModelPipeline

torch.set_num_threads(1)
if len(sys.argv) > 1:
    folder = Path(sys.argv[1])
else:
    package = importlib.util.find_spec("fewstep")  # finds the folder, imports nothing
    if package is None or package.origin is None:
        sys.exit("fewstep is not installed: name a student folder")
    folder = Path(package.origin).parent / "assets" / "digits_teacher"

pipe = ConsistencyModelPipeline.from_pretrained(str(folder))
pipe.set_progress_bar_config(disable=True)
calls = 0


def count(*_: object) -> None:
    global calls
    calls += 1


pipe.unet.register_forward_hook(count)
labels = [k % 10 for k in range(60)]
images = pipe(batch_size=60, class_labels=labels, num_inference_steps=1, generator=torch.manual_seed(0)).images

sheet = images[0].resize((10 * 24, 6 * 24))
for place, image in enumerate(images):
    sheet.paste(image.resize((24, 24)), (place % 10 * 24, place // 10 * 24))
sheet.save("digits.png")

assert "fewstep" not in sys.modules
print(f"{len(images)} digits in digits.png, calls of the network: {calls}  (promised: 1)")
