"""One state on disk: written aside, flushed, hashed, committed by a rename; only what is whole is ever loaded.

`RUN/checkpoints/step-00000100/` holds `engine/` (the backend's files), `ema/`, one `rng-rank-N.safetensors` a rank,
`state.json`, `manifest.json` (size and SHA-256 of each file) and `COMMITTED` (the manifest's own hash).
"""

from pipeline.checkpoint.directory import STATE, Checkpoints, has_checkpoints, is_checkpoint, read_state, saved_step

__all__ = ["STATE", "Checkpoints", "has_checkpoints", "is_checkpoint", "read_state", "saved_step"]
