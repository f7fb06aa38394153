"""`make test` takes some of the cases where there are many; `make soak-tests` takes all"""
import os

every_case = 'EVERY_CASE' in os.environ

def some(cases, n):
    "`n` of `cases`, from the first on at equal distances; or all"
    cases = list(cases)
    n = len(cases) if every_case else min(n, len(cases))
    return [cases[i*len(cases)//n] for i in range(n)]
