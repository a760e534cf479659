"""What a run would be and cost, told and measured before its first step: --dry-run."""

from pipeline.preflight.dry_run import dry_run

__all__ = ["dry_run"]
