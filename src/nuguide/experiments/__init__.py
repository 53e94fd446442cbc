"""The paper's tables and figures as data, the runner that fills them, and what draws them."""
