"""How fast this machine does it: python -m mlfsic_jax.benchmark [--rows=lcm_select,evaluation] [--json] [--quick]."""

from mlfsic_jax.bench.benchmark import main

if __name__ == "__main__":
    main()
