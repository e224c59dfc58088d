"""Concatenate test parts: head, then parts; imports merged at the top. usage: assemble_tests.py OUT PART..."""
import ast, sys
from pathlib import Path
ns={}; exec(src[src.index('STD='):src.index('# generate\n')].replace("W/","W/"), {'ast':ast,'sys':sys,'Path':Path,'re':__import__('re')}|ns, ns) if False else None
STD=set(sys.stdlib_module_names)
OURS=('llama','tokenizer','generate','train')
LAZY=('transformers','tokenizers','tiktoken','regex','hypothesis','sentencepiece','gguf','safetensors')
out=Path(sys.argv[1]); parts=[Path(p) for p in sys.argv[2:]]
plain,frm,bodies=set(),{},[]
headtext=parts[0].read_text()
doc=headtext[:headtext.index('import json')]  # docstring, os, OMP default
main_block=None
for k,p in enumerate(parts):
    s=p.read_text(); t=ast.parse(s); L=s.splitlines()
    drop=set()
    for n in t.body:
        if isinstance(n,ast.Import):
            for a in n.names:
                if a.name!='os' : plain.add((a.name,a.asname))
            drop.update(range(n.lineno,n.end_lineno+1))
        elif isinstance(n,ast.ImportFrom):
            if n.module not in ('test_head','test_fmt','test_sta','test_trn1','test_gen'):
                frm.setdefault(n.module,set()).update((a.name,a.asname) for a in n.names)
            drop.update(range(n.lineno,n.end_lineno+1))
        elif isinstance(n,ast.Expr) and k==0 and n is t.body[0]:
            drop.update(range(n.lineno,n.end_lineno+1))
        elif k==0 and isinstance(n,ast.Expr) and 'OMP_NUM' in ast.get_source_segment(s,n):
            drop.update(range(n.lineno,n.end_lineno+1))
        elif isinstance(n,ast.If) and '__main__' in ast.get_source_segment(s,n.test):
            main_block='\n'.join(L[n.lineno-1:n.end_lineno]); drop.update(range(n.lineno,n.end_lineno+1))
    body='\n'.join(l for i,l in enumerate(L,1) if i not in drop).strip('\n')
    bodies.append(body)
def fmt_from(m,names):
    items=[a+(f' as {b}' if b else '') for a,b in sorted(names,key=lambda x:(not x[0].isupper(), not x[0][0].isupper(), x[0]))]
    line=f"from {m} import {', '.join(items)}"
    if len(line)<=100: return [line]
    head=f"from {m} import ("; pad=' '*len(head); lines=[]; cur=head
    for i,it in enumerate(items):
        add=it+(',' if i<len(items)-1 else ')')
        if len(cur)+len(add)+1>100: lines.append(cur.rstrip()); cur=pad
        cur+=('' if cur.endswith('(') or cur==pad else ' ')+add
    lines.append(cur); return lines
groups=[[],[],[]]
def g(m):
    r=m.split('.')[0]
    return 2 if r in OURS else 0 if r in STD else 1
for a,b in plain: groups[g(a)].append((0,a,[f"import {a}"+(f" as {b}" if b else '')]))
for m,n in frm.items(): groups[g(m)].append((1,m,fmt_from(m,n)))
imp=[]
for gr in groups:
    for _,_,l in sorted(gr): imp+=l
    imp.append('')
text=doc.rstrip()+'\n\n'+'\n'.join(imp).strip('\n')+'\n\n'+'\n\n\n'.join(b for b in bodies if b)+'\n'
if main_block: text+='\n\n'+main_block+'\n'
out.write_text(text)
names={}
t=ast.parse(text)
for n in t.body:
    ns=[n.name] if isinstance(n,(ast.ClassDef,ast.FunctionDef)) else [x.id for tg in getattr(n,'targets',[]) for x in ast.walk(tg) if isinstance(x,ast.Name)]
    for x in ns:
        if x in names: print('TWICE',x,names[x],n.lineno)
        names[x]=n.lineno
print(len(text.splitlines()))
