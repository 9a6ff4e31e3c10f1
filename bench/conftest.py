"""Options of ``pytest bench``."""


def pytest_addoption(parser):
    group = parser.getgroup("adamprox")
    group.addoption("--large", action="store_true", help="time the large models, too")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: cpu)")
