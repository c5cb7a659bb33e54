"""All features' examples and figures: ours beside SAEDashboard and delphi, of one SAE and text.

    PYTHONPATH=benches python -m dashboards prepare DEMO_RUN WORK [--windows 2048]
    PYTHONPATH=benches python -m dashboards run WORK --sae-dashboard PYTHON --delphi PYTHON

DEMO_RUN is what `r1sae demo` made; each PYTHON is of an environment with that tool alone, as their
pins and ours don't go together (`sae-dashboard` with `pyarrow<22`, `eai-delphi`).
All three get the same rows from memory, so the model's own forward, which they would repeat, is
counted for none of them. Each runs its own code from rows to what its pages show, in a process of
its own, one after the other; loading is not counted. SAEDashboard's time grows with the number of
its batches of features, so `--features 256` gives it one of them; times are compared by the
feature.
"""
