"""From facts to a report: `model` holds it, `sections` and `plots` fill it, `renderers` show it, `report` ties them."""
