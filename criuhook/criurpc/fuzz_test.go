// SPDX-License-Identifier: Apache-2.0

package criurpc_test

import (
	"errors"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"

	"criuhook/criuhook/criurpc"
)

func FuzzDecode(f *testing.F) {
	for _, resp := range []*rpc.CriuResp{
		{Type: dump.Enum(), Success: proto.Bool(true), CrErrmsg: proto.String("Error (criu/x.c:1): x\n")},
		{Type: rpc.CriuReqType_NOTIFY.Enum(), Success: proto.Bool(true),
			Notify: &rpc.CriuNotify{Script: proto.String("setup-namespaces"), Pid: proto.Int32(-1)}},
	} {
		b, err := proto.Marshal(resp)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(unknown(b))
		f.Add(b[:len(b)-1])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		resp, err := criurpc.Decode(b)
		if err != nil {
			if !errors.Is(err, criurpc.ErrProtocol) || resp != nil {
				t.Errorf("%v with the error %v", resp, err)
			}
			return
		}
		if resp.GetType() == rpc.CriuReqType_NOTIFY && resp.GetNotify().GetScript() == "" {
			t.Error("a notification without a name")
		}
		// Nothing is lost on the way back.
		again, err := proto.Marshal(resp)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := criurpc.Decode(again); err != nil || !proto.Equal(resp, back) {
			t.Errorf("%v became %v, %v", resp, back, err)
		}
	})
}
