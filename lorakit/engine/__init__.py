"""Plans and what runs them. Moves blocks; knows neither names nor adapters."""
