import ast,sys
def stats(path):
    s=open(path).read(); t=ast.parse(s); n=len(s.splitlines())
    comps=sum(isinstance(x,(ast.ListComp,ast.SetComp,ast.DictComp,ast.GeneratorExp)) for x in ast.walk(t))
    ifs=sum(isinstance(x,ast.IfExp) for x in ast.walk(t))
    long=[l for l in s.splitlines() if len(l)>100]
    st=[x.lineno for x in ast.walk(t) if isinstance(x,ast.stmt)]
    fn=[]
    for x in ast.walk(t):
        if isinstance(x,(ast.FunctionDef,ast.AsyncFunctionDef)):
            b=x.body
            if b and isinstance(b[0],ast.Expr) and isinstance(b[0].value,ast.Constant) and isinstance(b[0].value.value,str): b=b[1:]
            if b:
                k=x.end_lineno-b[0].lineno+1
                if k>50: fn.append((x.name,k))
    return n,round(100*comps/n,1),round(100*ifs/n,1),len(long),len(st)-len(set(st)),fn
for p in sys.argv[1:]:
    print(p,*stats(p))
