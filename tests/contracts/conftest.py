from tests.one_cpu import one_cpu  # noqa: F401
