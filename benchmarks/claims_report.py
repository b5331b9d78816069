def summarize(results):
    return {}


def write(*a):
    pass
