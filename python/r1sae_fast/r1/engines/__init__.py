"""Ways to run the model: :mod:`r1sae_fast.r1.engines.local`, in this process."""
