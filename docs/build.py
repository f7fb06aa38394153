"Build the docs site: `python docs/build.py`; write README.md from nbs/index.ipynb: add `--readme`"
import shutil, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))

import nbdoc
from fastcore.script import call_parse
from nbdoc import cfg, md_link, pages, root, site, stage, to_md, up
from sphinx.cmd.build import build_main

def write_readme(dst):
    text,imgs = nbdoc.readme()
    static = dst/'docs'/'_static'
    static.mkdir(parents=True, exist_ok=True)
    for f in static.glob('readme-*.png'): f.unlink()
    for path,png in imgs.items(): (dst/path).write_bytes(png)
    (dst/'README.md').write_text(text)

def write_site(dst):
    "Write the site to `html` in `dst`; the exit status"
    src,tmp,out = dirs = dst/'src',dst/'doctrees',dst/'html'
    for o in dirs: shutil.rmtree(o, ignore_errors=True)
    mds = {f'{p.html}.md':to_md(p, md_link(up(p))) for p in pages.values()}
    mds['llms-full.txt'] = '\n\n---\n\n'.join(to_md(p, md_link()) for p in pages.values())
    stage(src)
    options = ['-q','-b','html','-n','-W','--keep-going']
    rc = build_main([*options,'-c',str(root/'docs'),'-d',str(tmp),str(src),str(out)])
    for path,s in mds.items(): (out/path).write_text(s)
    for f in nbdoc.files:
        (out/'files'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/f, out/'files'/f)
    if (cfg.nbs_path/'llms.txt').exists(): shutil.copy(cfg.nbs_path/'llms.txt', out)
    (out/'.nojekyll').touch()
    return rc

@call_parse
def main(
    readme:bool=False, # Write only README.md and its images?
    dest:str='' # Folder to write to: by default `docs_out` of settings.ini; for the README, the repository
):
    "Build the docs site, or write README.md"
    nbdoc.load()
    if readme: write_readme(Path(dest or root))
    else: sys.exit(write_site(Path(dest or site.docs_out)))
