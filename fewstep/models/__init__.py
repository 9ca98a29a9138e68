"""Networks: the project's own and foreign ones met through a narrow surface."""
