"""Models as one graph: compiled, and exported to torch and ONNX."""

import io
import warnings

import torch
from torch import nn
from variants import images, step

with warnings.catch_warnings():  # what onnxscript uses is deprecated
    warnings.simplefilter("ignore")
    import onnxruntime
    import onnxscript  # noqa: F401


def check_compiles(model: nn.Module, backend: str) -> None:
    """As one graph, with the same answers and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(step(compiled), step(model), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def check_exports(model: nn.Module, any_batch: bool) -> None:
    """As a program of torch, and that as ONNX, which onnxruntime runs; `any_batch`: both take batches of any size."""
    model.eval()
    size = {0: torch.export.Dim("batch")} if any_batch else None
    given = images(3 if any_batch else 2)
    program = torch.export.export(model, (images(2),), dynamic_shapes=(size,))
    torch.testing.assert_close(program.module()(given), model(given))
    with warnings.catch_warnings():  # what torch.onnx uses is deprecated
        warnings.simplefilter("ignore", FutureWarning)
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
    file = io.BytesIO()
    exported.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (answer,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), model(given), rtol=0, atol=1e-4)
