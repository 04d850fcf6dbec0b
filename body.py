import numpy as np, onnx, torch, sys
from onnx import helper as h, TensorProto as T, AttributeProto as A
sys.path.insert(0,'/work/main')
from paredown.kernels.pack import pack, word
def ref(name, attr, kind):
    a = A(); a.name=name; a.ref_attr_name=attr; a.type=kind; return a
def const(out, value, attr, kind):
    n = h.make_node("Constant", [], [out]); n.attribute.append(ref(value, attr, kind)); return n
N = h.make_node
def decode_nodes(out):
    I=lambda o,a: const(o,"value_int",a,A.INT)
    cast=lambda x,o: N("Cast",[x],[o],to=T.FLOAT)
    wt=N("Cast",["codes"],["bytes"]); wt.attribute.append(ref("to","word_type",A.INT))
    def castw(x,o):
        n=N("Cast",[x],[o]); n.attribute.append(ref("to","word_type",A.INT)); return n
    return [
      const("places64","value_ints","places",A.INTS), castw("places64","places_"),
      const("divisors64","value_ints","divisors",A.INTS), castw("divisors64","divisors_"),
      I("n_","n"), I("k_","k"), I("levels64","levels"), castw("levels64","levels_"), I("group_","group"), I("rows_","table_rows"),
      wt,
      N("Shape",["places64"],["bytes_per"]), N("Constant",[],["minus1"],value_ints=[-1]), N("Constant",[],["zero"],value_ints=[0]),N("Constant",[],["one"],value_ints=[1]),
      N("Constant",[],["s0"],value_int=0),N("Constant",[],["s1"],value_int=1),
      N("Concat",["minus1","bytes_per"],["bytes_shape"],axis=0),
      N("Reshape",["bytes","bytes_shape"],["byte_rows"]),
      N("Mul",["byte_rows","places_"],["placed"]),
      N("ReduceSum",["placed","one"],["words"],keepdims=1),
      N("Div",["words","divisors_"],["q"]), N("Div",["q","levels_"],["qq"]), N("Mul",["qq","levels_"],["qm"]), N("Sub",["q","qm"],["digits"]),
      N("Reshape",["digits","minus1"],["stream"]),
      N("Mul",["n_","k_"],["count"]), N("Reshape",["count","one"],["count1"]),
      N("Slice",["stream","zero","count1"],["taken"]),
      N("Reshape",["n_","one"],["n1"]), N("Reshape",["k_","one"],["k1"]),
      N("Concat",["n1","k1"],["shape"],axis=0),
      N("Reshape",["taken","shape"],["code"]),
      N("Range",["s0","n_","s1"],["row"]), N("Equal",["rows_","s0"],["nt"]), N("Where",["nt","n_","rows_"],["rows2"]),
      N("Div",["row","rows2"],["block"]), N("Mul",["block","levels64"],["offs"]), castw("offs","offw"), N("Unsqueeze",["offw","one"],["offset"]),
      N("Add",["code","offset"],["index"]),
      N("Cast",["table"],["tablef"],to=T.FLOAT), const("unit_","value_float","unit",A.FLOAT), N("Mul",["tablef","unit_"],["tableu"]),
      N("Reshape",["tableu","minus1"],["flat"]),
      N("Gather",["flat","index"],["values"],axis=0),
      N("Range",["s0","k_","s1"],["col"]), N("Equal",["group_","s0"],["ng"]), N("Where",["ng","k_","group_"],["group2"]),
      N("Div",["col","group2"],["cg"]), N("Cast",["scale"],["scalef"],to=T.FLOAT), N("Gather",["scalef","cg"],["scales"],axis=1),
      N("Mul",["values","scales"],["w32"]),
      (lambda n:(n.attribute.append(ref("to","dtype",A.INT)),n)[1])(N("Cast",["w32"],[out])),
    ]
ATTRS=["n","k","levels","group","table_rows","word_type","dtype","unit","places","divisors"]
def fn(): return h.make_function("paredown","LutDecode",["codes","table","scale"],["W"],decode_nodes("W"),[h.make_opsetid("",20)],ATTRS)
def node(i,n,k,bits,group,tr,unit,dtype=T.FLOAT):
    size,per=word(bits)
    return N("LutDecode",[f"c{i}",f"t{i}",f"s{i}"],[f"W{i}"],domain="paredown",name=f"d{i}",n=n,k=k,levels=2**bits,group=group,table_rows=tr,word_type=T.INT32 if size<4 else T.INT64,dtype=dtype,unit=float(unit),
      places=[256**j for j in range(size)],divisors=[2**(bits*j) for j in range(per)])
def main():
    from paredown.optimizer.weight import Codebook
    torch.manual_seed(0)
    nodes,inits,outs,want=[],[],[],[]
    for i,(n,k,bits,group,tr,td) in enumerate([(7,13,3,0,0,torch.int8),(33,30,4,8,16,torch.float16),(5,9,8,4,0,torch.int8),(5,9,2,4,2,torch.int8),(5,9,5,4,2,torch.int8),(5,9,7,4,2,torch.int8),(5,9,6,4,2,torch.int8),(5,9,1,4,2,torch.int8)]):
        codes=torch.randint(0,2**bits,(n,k),dtype=torch.uint8); blocks=-(-n//tr) if tr else 1
        table=(torch.randint(-127,128,(blocks,2**bits)).to(torch.int8) if td==torch.int8 else torch.randn(blocks,2**bits).half())
        w=Codebook(codes=codes,table=table,scale=torch.randn(n,-(-k//group) if group else 1).half(),code_bits=bits,group=group,table_rows=tr)
        nodes.append(node(i,n,k,bits,group,tr,w.unit)); outs.append(h.make_tensor_value_info(f"W{i}",T.FLOAT,[n,k])); want.append(w.dense().numpy())
        inits+=[onnx.numpy_helper.from_array(pack(codes,bits).numpy(),f"c{i}"),onnx.numpy_helper.from_array(table.numpy(),f"t{i}"),onnx.numpy_helper.from_array(w.scale.numpy(),f"s{i}")]
    m=h.make_model(h.make_graph(nodes,"g",[],outs,inits),functions=[fn()],opset_imports=[h.make_opsetid("",20),h.make_opsetid("paredown",1)],ir_version=10)
    onnx.checker.check_model(m,full_check=True)
    onnx.shape_inference.infer_shapes(m,strict_mode=True,data_prop=True)
    onnx.save(m,"body.onnx")
    import onnxruntime as ort
    s=ort.InferenceSession("body.onnx"); r=s.run(None,{})
    print([np.array_equal(a,b) for a,b in zip(r,want)])
    from onnx.reference import ReferenceEvaluator
    print([np.array_equal(a,b) for a,b in zip(ReferenceEvaluator(m).run(None,{}),want)])
if __name__=="__main__": main()
