"""The entrance: both wires, what they translate, and the Gateway behind them."""
