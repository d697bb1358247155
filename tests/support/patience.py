"""How long tests wait for what must come: no test fails because the machine is busy."""

HANG_SECONDS = 600  # after which a wait is taken for a hang
