"The wheel that `python -m build` makes"
import configparser, subprocess, sys, zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from cases import every_case

root = Path(__file__).parent.parent
@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    cmd = [sys.executable, '-m', 'build', '--outdir', out, root]
    if not every_case: cmd.append('--no-isolation')     # with the tools that are there, if new enough
    subprocess.run(cmd, check=True, capture_output=True)
    return next(out.glob('*.whl'))

@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        name = next(o for o in z.namelist() if o.endswith('/METADATA'))
        return Parser().parsestr(z.read(name).decode())

def test_metadata(metadata):
    import fastai_callbacks_ext as lib
    assert (metadata['Name'], metadata['Version']) == ('fastai_callbacks_ext', lib.__version__)
    assert metadata['Requires-Python'] == '>=3.10' and metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Summary'] and 'make demo' in metadata.get_payload()

def test_dependencies(metadata):
    needs = metadata.get_all('Requires-Dist')
    core = {o.split(';')[0].strip() for o in needs if 'extra' not in o}
    assert core == {'fastai<2.9,>=2.8.12', 'torch>=2.6', 'fastcore'}
    assert set(metadata.get_all('Provides-Extra')) == {'docs', 'dev', 'bench', 'browser', 'distributed'}
    assert any('nbdev' in o and 'extra == "docs"' in o for o in needs)

def test_content(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        entry = configparser.ConfigParser()
        entry.read_string(z.read(next(n for n in names if n.endswith('/entry_points.txt'))).decode())
    assert dict(entry['nbdev']) == {'fastai_callbacks_ext': 'fastai_callbacks_ext._modidx:d'}
    want = {p.relative_to(root).as_posix() for p in (root/'fastai_callbacks_ext').rglob('*.py')}
    want.add('fastai_callbacks_ext/py.typed')
    assert want == {n for n in names if n.startswith('fastai_callbacks_ext/')}
    assert any(n.endswith('/LICENSE') for n in names)

def test_works_from_wheel(wheel, tmp_path):
    "The wheel alone, not the checkout, trains; it brings fastai's modules alone (`torch._dynamo` takes 2 s)"
    code = f'''
import sys; sys.path.insert(0, {str(wheel)!r})
import fastai_callbacks_ext as lib; assert '.whl' in lib.__file__, lib.__file__
from fastai.basics import *
loaded = {{*sys.modules}}
from fastai_callbacks_ext.all import *
others = {{o.split('.')[0] for o in sys.modules if o not in loaded}}
assert others-sys.stdlib_module_names<={{'fastai','fastai_callbacks_ext','matplotlib'}}, others
from fastai_callbacks_ext.test_utils import *
learn = digits_learner(TerminateOnNaN(), n=200)
learn.fit(1)
'''
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, capture_output=True)
