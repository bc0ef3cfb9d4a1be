"""Data-parallel training: several processes train one model, each on its rows of every batch."""

from xpnet.distributed.mpi import Communicator, started_by_mpi

__all__ = ["Communicator", "started_by_mpi"]
