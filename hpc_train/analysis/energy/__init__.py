"""Energy of runs and of sizes, CO2 and price."""
