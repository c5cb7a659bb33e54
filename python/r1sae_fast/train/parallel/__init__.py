"""Training in many processes: rows and features shared out to ranks (torch.distributed).

The step asks :class:`Ranks` for what other processes have; :data:`ALONE` answers for a process of
its own. ``grid`` is the answer of many, ``run`` trains with it, ``launch`` starts the processes.
"""

from r1sae_fast.train.parallel.layout import Layout
from r1sae_fast.train.parallel.ranks import ALONE, Alone, Ranks

__all__ = ["ALONE", "Alone", "Layout", "Ranks"]
