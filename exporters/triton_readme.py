"""README.md of a model repository: how to serve, ask and measure the model in it."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

_PAGE = Template("""# $name for Triton Inference Server

$notes
## Serve

`$$TRITON_IMAGE` is a tritonserver image with the $backend backend$needs. Run this in this folder:

```bash
docker run --rm $gpus-p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$$PWD:$mount:ro" "$$TRITON_IMAGE" \\
    tritonserver --model-repository=$mount
```

Without docker, `tritonserver --model-repository=$mount` where this folder is at $mount. `$name` is ready when
`curl -f localhost:8000/v2/models/$name/ready` succeeds; a request of each size has warmed it up by then.

## Ask

```python
import numpy as np
import tritonclient.http as triton  # pip install 'tritonclient[http]'

client = triton.InferenceServerClient("localhost:8000")
print(client.get_model_config("$name"))
feeds = []
for spec in client.get_model_metadata("$name")["inputs"]:
    shape = [1 if int(size) < 0 else int(size) for size in spec["shape"]]
    feeds.append(triton.InferInput(spec["name"], shape, spec["datatype"]))
    feeds[-1].set_data_from_numpy(np.zeros(shape, triton.triton_to_np_dtype(spec["datatype"])))
answer = client.infer("$name", feeds)
print({item["name"]: answer.as_numpy(item["name"]).shape for item in answer.get_response()["outputs"]})
```

## Measure

```bash
perf_analyzer -m $name -i grpc -u localhost:8001 -b 1$shapes --concurrency-range 1:16:5 --percentile=99
```

Requests that arrive together share an execution, up to `max_batch_size`, for which they wait
`max_queue_delay_microseconds` at most; both are in `$name/config.pbtxt`. More instances execute at the same time, and
share the cores.
""")


def readme(name: str, config: Path, mount: str) -> str:
    """Return the page for a model with a configuration that is written already."""
    text = config.read_text(encoding="utf-8")
    notes = "".join(f"* {line.removeprefix('# ')}\n" for line in text.splitlines() if line.startswith("# "))
    plan = "tensorrt_plan" in text
    return _PAGE.substitute(
        name=name,
        mount=mount,
        notes=notes,
        backend="tensorrt" if plan else "onnxruntime",
        needs=" (onnxruntime 1.20 or newer for our library)" if "op_library_filename" in text else "",
        gpus="--gpus=all " if plan else "",
        shapes=_shapes(text),
    )


def _shapes(config: str) -> str:
    """Return what perf_analyzer has to be told of inputs whose dimensions vary: their sizes in the warm-up."""
    varying = re.findall(r'^input \{\n  name: "([^"]+)"\n.*\n  dims: \[[^\]]*-1', config, re.MULTILINE)
    found = [(name, re.search(rf'key: "{re.escape(name)}"\n.*\n.*\n\s*dims: \[([^\]]*)\]', config)) for name in varying]
    return "".join(f" --shape {name}:{match[1].replace(' ', '')}" for name, match in found if match)
