"""A SIMULATED processor package for Slurm's plugin acct_gather_energy/rapl: a file in place of /dev/cpu/0/msr that
draws 50 W. It tests that joules are passed on; it measures nothing.
"""

import os
import struct
import sys
from time import monotonic, sleep

WATTS = 50.0
UNIT, PACKAGE, MEMORY = 0x606, 0x611, 0x619  # Intel's manual, volume 4: MSR_RAPL_POWER_UNIT and what it is the unit of
ENERGY_UNIT = 16  # joules are counted in 2**-16


def main() -> None:
    file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(file, 0x700)
    os.pwrite(file, struct.pack("<Q", ENERGY_UNIT << 8), UNIT)
    os.pwrite(file, struct.pack("<I", 0), MEMORY)
    began_s = monotonic()
    while True:
        os.pwrite(
            file, struct.pack("<I", round(WATTS * (monotonic() - began_s) * 2**ENERGY_UNIT) & 0xFFFFFFFF), PACKAGE
        )
        sleep(0.1)


if __name__ == "__main__":
    main()
